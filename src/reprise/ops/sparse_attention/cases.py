from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from reprise.ops.cases import Arguments, Cases, Maker, Workload
from reprise.ops.compressor.cases import paged, step
from reprise.ops.latent_rows import as_codes
from reprise.ops.rotary_tail.cases import HEAD, ROTATED


def arguments(
    make: Maker, lengths: Sequence[int], new: Sequence[int], heads: int, size: int, window: int,
    query_len: int, every: int = 0, top: int = 0, padding: int = 0,
    blocks: tuple[int, int] = (8, 16),
) -> Arguments:  # fmt: skip
    """``every``: 0: no compressed rows; ``top``: of these so many are selected, 0: all."""
    tables, _, count = paged(make, lengths, new, blocks[0], padding)
    others, _, rows = paged(make, lengths, new, blocks[1], padding)
    tokens = sum(new) + padding
    where = step(make, lengths, new, padding)
    selected = None
    per_block = blocks[1] // every if every else 0
    if top:
        selected = torch.zeros(tokens, top, dtype=torch.int32, device=make.device)
        owners, seen = [], []
        for row, (length, more) in enumerate(zip(lengths, new, strict=True)):
            owners += [row] * more
            seen += [(place + 1) // every for place in range(length - more, length)]
        numbers = 2 * torch.arange(top, device=make.device)
        entries = (numbers // per_block).clamp(max=others.shape[1] - 1)
        found = others[make.ints(owners)[:, None], entries] * per_block + numbers % per_block
        selected[: len(seen)] = found.where(numbers < make.ints(seen)[:, None], 0).int()
    return {
        "query": make.randn(tokens, heads, size),
        "cache": make.randn(count, blocks[0], size),
        "block_tables": tables,
        "compressed": make.randn(rows, per_block, size) if every else None,
        "compressed_tables": others if every else None,
        "selected": selected,
        "sinks": make.randn(heads, dtype=torch.float32),
        "seq_lens": where["seq_lens"],
        "query_start_loc": where["query_start_loc"],
        "out": make.randn(tokens, heads, size),
        "scale": size**-0.5,
        "sliding_window": window,
        "every": every,
        "query_len": query_len,
        "cache_tail": None,
        "scales": None,
        "compressed_tail": None,
        "compressed_scales": None,
    }


def _coded(found: Arguments, rotated: int, dtype: torch.dtype) -> Arguments:
    """The same of caches of codes."""
    found = dict(found)
    for name, names in (
        ("cache", ("cache_tail", "scales")),
        ("compressed", ("compressed_tail", "compressed_scales")),
    ):
        if found[name] is not None:
            made = as_codes(found[name], rotated, dtype)
            found |= dict(zip((name, *names), made, strict=True))
    return found


def _small(make: Maker) -> list[Arguments]:
    plain = _small_of_numbers(make)
    coded = [] if make.fp8 is None else [_coded(each, 8, make.fp8) for each in plain[:3]]
    return [*plain, *coded]


def _small_of_numbers(make: Maker) -> list[Arguments]:
    return [
        arguments(make, [3, 37, 64, 0], [1, 1, 1, 0], 4, 32, 16, 1, padding=1),
        arguments(make, [21, 50, 5, 0], [21, 13, 3, 0], 4, 32, 16, 0, every=4, top=4, padding=2),
        arguments(make, [40, 18], [4, 4], 8, 32, 12, 4, every=16),
        arguments(make, [1, 33], [1, 1], 4, 32, 16, 1, every=4, top=8),
        arguments(make, [47, 5], [47, 2], 4, 32, 16, 0, every=16, padding=3),
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for every, top in ((0, 0), (4, 512), (128, 0)):
        for requests, length in ((1, 4096), (64, 4096), (1, 131072), (8, 131072), (64, 131072)):
            rows = 128 + min(top or length, length // every if every else 0)
            yield Workload(
                f"Flash, by {every}, {requests} x {length}",
                functools.partial(
                    arguments, make, [length] * requests, [1] * requests, 64, HEAD, 128, 1,
                    every=every, top=top, blocks=(32, 128),
                ),
                read_write=requests * rows * HEAD * 2,
                compiled=length == 4096,
            )  # fmt: skip
    if make.fp8 is not None:
        yield Workload("Flash, by 4, 64 x 4096, codes", _codes_of_flash(make, 64), compiled=True)
        yield Workload("Flash, by 4, 1 x 4096, codes", _codes_of_flash(make, 1), compiled=True)


def _codes_of_flash(make: Maker, requests: int) -> Callable[[], Arguments]:
    def made() -> Arguments:
        assert make.fp8 is not None
        found = arguments(
            make, [4096] * requests, [1] * requests, 64, HEAD, 128, 1, every=4, top=512,
            blocks=(32, 128),
        )  # fmt: skip
        return _coded(found, ROTATED, make.fp8)

    return made


cases = Cases(_small, _workloads)
