from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from reprise.ops.cases import EPS, Arguments, Cases, Maker, Workload
from reprise.ops.latent_rows import as_codes
from reprise.ops.rotary_tail.cases import HEAD, ROTATED, table


def _arguments(make: Maker, tokens: int, size: int, rotated: int, *, wide: bool) -> Arguments:
    return {
        "kv": make.randn(tokens, 24 + size)[:, 24:],
        "gain": make.randn(size, dtype=torch.float32 if wide else None),
        "norm_eps": EPS,
        "positions": make.ints((5 * each) % 32 for each in range(tokens)),
        "cos_sin": table(make, 32, rotated),
        "slots": make.permutation(16 * (2 + tokens // 16))[:tokens] + 16,
        "cache": make.randn(4 + tokens // 16, 16, size),
        "tail": None,
        "scales": None,
    }


def _small(make: Maker) -> list[Arguments]:
    plain = [_arguments(make, 1, 32, 8, wide=True), _arguments(make, 9, 64, 64, wide=False)]
    if make.fp8 is None:
        return plain
    return [*plain, _coded(_arguments(make, 5, 32, 8, wide=True), 8, make.fp8)]


def _coded(found: Arguments, rotated: int, dtype: torch.dtype) -> Arguments:
    """The same of a cache of codes."""
    made = as_codes(found["cache"], rotated, dtype)
    return {**found, **dict(zip(("cache", "tail", "scales"), made, strict=True))}


def _workloads(make: Maker) -> Iterator[Workload]:
    for tokens in (1, 64, 8192):
        yield Workload(
            f"V4, T={tokens}",
            functools.partial(_arguments, make, tokens, HEAD, ROTATED, wide=True),
            read_write=2 * 2 * tokens * HEAD,
            compiled=tokens <= 64,
        )
    if make.fp8 is not None:
        dtype = make.fp8
        yield Workload(
            "V4, T=64, codes",
            lambda: _coded(_arguments(make, 64, HEAD, ROTATED, wide=True), ROTATED, dtype),
            read_write=64 * (3 * HEAD + 3 * ROTATED),
            compiled=True,
        )


cases = Cases(_small, _workloads)
