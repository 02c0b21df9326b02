from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from reprise.ops.cases import Arguments, Cases, Maker, Workload
from reprise.ops.rotary_tail.cases import table

BLOCK = 128


def _arguments(
    make: Maker, tokens: int, groups: int, heads: int, size: int, rotated: int, outputs: int,
    block_n: int, block_k: int,
) -> Arguments:  # fmt: skip
    inputs = heads * size
    blocks = groups * outputs // block_n, -(-inputs // block_k)
    scale = make.randn(*blocks, dtype=torch.float32).abs() + 0.1
    return {
        "x": make.randn(tokens, groups * heads, size),
        "positions": make.ints((7 * each) % 40 for each in range(tokens)),
        "cos_sin": table(make, 40, rotated),
        "weight": make.randn(groups * outputs, inputs, dtype=torch.float8_e4m3fn),
        "scale": scale / inputs**0.5,
        "groups": groups,
        "block_n": block_n,
        "block_k": block_k,
    }


def _small(make: Maker) -> list[Arguments]:
    return [
        _arguments(make, 1, 2, 2, 128, 32, 40, 8, BLOCK),
        _arguments(make, 5, 3, 1, 256, 64, 128, BLOCK, BLOCK),
        _arguments(make, 19, 1, 2, 128, 128, 24, 24, BLOCK),
        # What rotates begins within a group of channels.
        _arguments(make, 4, 2, 2, 256, 160, 24, 24, BLOCK),
        # No tile of the kernels.
        _arguments(make, 3, 2, 2, 32, 8, 16, 16, 64),
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for tokens in (1, 64, 4096):
        yield Workload(
            f"Flash, T={tokens}",
            functools.partial(_arguments, make, tokens, 8, 8, 512, 64, 1024, BLOCK, BLOCK),
            read_write=8 * 4096 * 1024 if tokens < 512 else 0,
            operations=2 * tokens * 8 * 4096 * 1024 if tokens >= 512 else 0,
            compiled=True,
        )


cases = Cases(_small, _workloads)
