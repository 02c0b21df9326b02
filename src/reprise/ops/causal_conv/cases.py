from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from reprise.ops.cases import Arguments, Cases, Maker, Workload

WIDTH = 4
"""Taps, in every released model."""


def batch(
    make: Maker, begins: Sequence[int], new: Sequence[int], fresh: Sequence[bool]
) -> Arguments:
    """What ops that rewrite states are told of the step: requests with ``new`` tokens behind
    ``begins`` earlier ones, 0 and 0 for padding; slot 0 is no request's."""
    starts = [sum(new[:count]) for count in range(len(new) + 1)]
    lengths = [old + more for old, more in zip(begins, new, strict=True)]
    slots = [0 if each == 0 else len(new) - row for row, each in enumerate(lengths)]
    return {
        # A column of the table of blocks.
        "slots": make.ints(slots, torch.int32).unsqueeze(1).repeat(1, 3)[:, 1],
        "query_start_loc": make.ints(starts, torch.int32),
        "seq_lens": make.ints(lengths, torch.int32),
        "fresh": make.ints(fresh).bool(),
    }


STEPS = (
    # Tokens before, new tokens, fresh, query_len, tokens of padding behind the requests.
    ([5, 0, 64, 0], [1, 1, 1, 0], [False, True, False, True], 1, 1),
    ([0, 7, 0, 3, 0], [70, 2, 1, 5, 0], [True, False, True, False, True], 0, 3),
)
"""Steps of every kind, for ops that rewrite states."""
DRAFTS = 3
VERIFYING = (
    # As above, then: of each request, tokens of its last step that count, and known ones; and how
    # many of its last drafts nobody reads.
    ([5, 70, 64, 0], [4, 4, 4, 0], [False, False, False, True], 4, 4, [1, 4, 0, 0], [0, 0, 0, 0],
     [0, 2, 0, 0]),
    ([0, 9, 3, 8, 0], [4, 4, 70, 4, 0], [True, False, False, False, True], 0, 3, [0, 2, 3, 0, 0],
     [4, 0, 70, 4, 0], [0, 1, 0, 0, 0]),
)  # fmt: skip
"""Steps in which some requests verify so many drafts, and others have as many known tokens."""


NO_DRAFTS = dict.fromkeys(("accepted", "known", "places"))


def drafts(
    make: Maker, new: Sequence[int], padding: int, accepted: Sequence[int], known: Sequence[int],
    unread: Sequence[int],
) -> Arguments:  # fmt: skip
    """What ops are told in such a step beside :func:`batch`."""
    places: list[int] = []
    for count, nobodys in zip(new, unread, strict=True):
        places += [1] * (count - nobodys) + [0] * nobodys
    return {
        "accepted": make.ints(accepted, torch.int32),
        "known": make.ints(known, torch.int32),
        "places": make.ints([*places, *[0] * padding]),
    }


def _small(make: Maker) -> list[Arguments]:
    size = 40
    return [
        {
            # A part of a wider product.
            "x": make.randn(sum(new) + padding, 2 * size)[:, :size],
            "weight": make.randn(size, WIDTH),
            "state": make.randn(len(new) + 1, WIDTH - 1 + (DRAFTS if told else 0), size),
            **batch(make, begins, new, fresh),
            "out": make.randn(sum(new) + padding, size),
            "query_len": query_len,
            **(drafts(make, new, padding, *told) if told else NO_DRAFTS),
        }
        for begins, new, fresh, query_len, padding, *told in (*STEPS, *VERIFYING)
    ]


def _workload(make: Maker, size: int, requests: int, new: int, *, compiled: bool) -> Workload:
    decode = new == 1

    def arguments() -> Arguments:
        return {
            "x": make.randn(requests * new, size + 64)[:, :size],
            "weight": make.randn(size, WIDTH),
            "state": make.randn(requests + 1, WIDTH - 1, size),
            **batch(make, [decode] * requests, [new] * requests, [not decode] * requests),
            "out": make.randn(requests * new, size),
            "query_len": int(decode),
            **NO_DRAFTS,
        }

    windows = requests * (WIDTH - 1) * (1 + decode)
    return Workload(
        f"{size} channels, {requests} x {new}",
        arguments,
        read_write=2 * size * (2 * requests * new + windows),
        compiled=compiled,
    )


def _workloads(make: Maker) -> Iterator[Workload]:
    for size in (1536, 8192):
        for requests in (1, 32, 128, 512):
            yield _workload(make, size, requests, 1, compiled=requests == 32)
        yield _workload(make, size, 1, 8192, compiled=size == 1536)


cases = Cases(_small, _workloads)
