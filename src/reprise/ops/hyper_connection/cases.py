from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from reprise.ops.cases import EPS, Arguments, Cases, Maker, Workload

STREAMS = 4
FLASH = 4096
"""Width of DeepSeek-V4-Flash."""


def arguments(make: Maker, tokens: int, size: int, *, wide: bool = True) -> Arguments:
    """``wide``: the gain is float32."""
    factors = (2 + STREAMS) * STREAMS
    matrix = make.randn(tokens, STREAMS, STREAMS, dtype=torch.float32).softmax(-1)
    return {
        "streams": make.randn(tokens, STREAMS, size),
        "fn": make.randn(factors, STREAMS * size, dtype=torch.float32) / (STREAMS * size) ** 0.5,
        "base": make.randn(factors, dtype=torch.float32),
        "scale": make.floats(0.7, 0.9, 0.6),
        "gain": make.randn(size, dtype=torch.float32 if wide else None),
        "iterations": 20,
        "eps": EPS,
        "norm_eps": EPS,
        "y": make.randn(tokens, size),
        "post": make.randn(tokens, STREAMS, dtype=torch.float32).abs(),
        "comb": matrix,
    }


def _small(make: Maker) -> list[Arguments]:
    return [
        arguments(make, 1, 64),
        arguments(make, 9, 48),
        arguments(make, 3, 64, wide=False),
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for tokens in (1, 64, 8192):
        yield Workload(
            f"Flash, T={tokens}",
            functools.partial(arguments, make, tokens, FLASH),
            read_write=2 * tokens * FLASH * (2 * STREAMS + 2) + 4 * 24 * STREAMS * FLASH,
            compiled=tokens < 8192,
        )


cases = Cases(_small, _workloads)
