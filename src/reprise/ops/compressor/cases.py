from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reprise.ops.cases import EPS, Arguments, Cases, Maker, Workload
from reprise.ops.latent_rows import as_codes
from reprise.ops.rotary_tail.cases import HEAD, ROTATED, table


def paged(
    make: Maker, lengths: Sequence[int], new: Sequence[int], block: int, padding: int
) -> tuple[Tensor, Tensor, int]:
    """Block tables of requests of these lengths, slots of their new tokens and of padding, and how
    many blocks there are; the blocks of a request are no neighbours."""
    counts = [-(-length // block) for length in lengths]
    width = max(1, *counts)
    order = make.permutation(sum(counts)) + 1
    entries: list[int] = []
    owners: list[int] = []
    places: list[int] = []
    first = 0
    for row, (length, more, count) in enumerate(zip(lengths, new, counts, strict=True)):
        entries += range(row * width, row * width + count)
        places += range(length - more, length)
        owners += [first + place // block for place in range(length - more, length)]
        first += count
    # A few calls of torch, however many requests: for shapes alone each takes a millisecond.
    tables = torch.zeros(len(lengths) * width, dtype=torch.int32, device=make.device)
    tables[make.ints(entries)] = order.int()
    slots = order[make.ints(owners)] * block + make.ints([place % block for place in places])
    whole = torch.cat([slots, make.ints([0] * padding)])
    return tables.view(-1, width), whole, sum(counts) + 1


def step(
    make: Maker, lengths: Sequence[int], new: Sequence[int], padding: int = 0
) -> dict[str, Tensor]:
    """Where the new tokens of requests are, with so many tokens of padding behind them."""
    starts = [sum(new[:count]) for count in range(len(new) + 1)]
    places = [p for length, count in zip(lengths, new, strict=True)
              for p in range(length - count, length)]  # fmt: skip
    return {
        "positions": make.ints([*places, *[0] * padding]),
        "query_start_loc": make.ints(starts, torch.int32),
        "seq_lens": make.ints(lengths, torch.int32),
    }


def arguments(
    make: Maker, lengths: Sequence[int], new: Sequence[int], every: int, size: int, rotated: int,
    *, overlap: bool, blocks: tuple[int, int], padding: int = 0,
) -> Arguments:  # fmt: skip
    """``blocks``: tokens of a block of states, and of a block of rows."""
    channels = size * (2 if overlap else 1)
    states, state_slots, num_states = paged(make, lengths, new, blocks[0], padding)
    _, slots, num_rows = paged(make, lengths, new, blocks[1], padding)
    tokens = sum(new) + padding
    return {
        "projected": make.randn(tokens, 2 * channels + 8, dtype=torch.float32)[:, : 2 * channels],
        "bias": make.randn(every, channels, dtype=torch.float32),
        "state": make.randn(num_states, blocks[0], 2 * channels, dtype=torch.float32),
        "state_slots": state_slots,
        "block_tables": states,
        **step(make, lengths, new, padding),
        "gain": make.randn(size, dtype=torch.float32),
        "norm_eps": EPS,
        "cos_sin": table(make, max(1, *lengths), rotated),
        "cache": make.randn(num_rows, blocks[1] // every, size),
        "slots": slots,
        "tail": None,
        "scales": None,
    }


def _coded(make: Maker, rotated: int, dtype: torch.dtype) -> Arguments:
    """Of a cache of codes, beside ``rotated`` numbers a row."""
    found = arguments(make, [9, 4], [6, 4], 4, 32, 8, overlap=True, blocks=(8, 16))
    made = as_codes(found["cache"], rotated, dtype)
    return {**found, **dict(zip(("cache", "tail", "scales"), made, strict=True))}


def _small(make: Maker) -> list[Arguments]:
    # At most one token of padding: several share a slot, and any may be the last to write it.
    behind = arguments(make, [12, 9], [5, 5], 4, 32, 32, overlap=True, blocks=(4, 8))
    # Drafts beyond a request's end have no place.
    behind["slots"] = make.ints([0, 0, 0, 0, 0, 8, 9, 10, 11, 12])
    small = ((8, 8), (8, 16))
    prompts, lengths = [10, 8, 3, 0], [21, 8, 3, 0]
    coded = [] if make.fp8 is None else [_coded(make, rotated, make.fp8) for rotated in (8, 0)]
    return [
        arguments(make, [4, 7, 0], [1, 1, 0], 4, 32, 8, overlap=True, blocks=small[0], padding=1),
        arguments(make, lengths, prompts, 4, 16, 8, overlap=True, blocks=small[1], padding=1),
        arguments(make, [16, 40], [1, 33], 16, 32, 8, overlap=False, blocks=small[1]),
        behind,
        *coded,
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for every, overlap in ((4, True), (128, False)):
        for requests, new, length in ((1, 1, 4096), (64, 1, 4096), (1, 8192, 8192)):
            channels = HEAD * (2 if overlap else 1)
            yield Workload(
                f"by {every}, {requests} x {new}",
                functools.partial(
                    arguments, make, [length] * requests, [new] * requests, every, HEAD, ROTATED,
                    overlap=overlap, blocks=(max(8, every // 4), 128),
                ),
                read_write=requests * (4 * 2 * channels * (2 * new + every)),
                compiled=requests == 64,
            )  # fmt: skip
        if make.fp8 is not None:
            yield Workload(
                f"by {every}, codes", functools.partial(_codes_of_flash, make, every, overlap),
                compiled=True,
            )  # fmt: skip


def _codes_of_flash(make: Maker, every: int, overlap: bool) -> Arguments:
    assert make.fp8 is not None
    found = arguments(
        make, [4096], [1], every, HEAD, ROTATED, overlap=overlap,
        blocks=(max(8, every // 4), 128),
    )  # fmt: skip
    made = as_codes(found["cache"], ROTATED, make.fp8)
    return {**found, **dict(zip(("cache", "tail", "scales"), made, strict=True))}


cases = Cases(_small, _workloads)
