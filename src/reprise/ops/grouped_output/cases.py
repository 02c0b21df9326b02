from __future__ import annotations

import functools
from collections.abc import Iterator

from reprise.ops.cases import Arguments, Cases, Maker, Workload


def _arguments(make: Maker, tokens: int, groups: int, inputs: int, outputs: int) -> Arguments:
    return {
        "x": make.randn(tokens, groups, inputs) / inputs**0.5,
        "weight": make.randn(groups * outputs, inputs),
    }


def _small(make: Maker) -> list[Arguments]:
    strided = _arguments(make, 5, 2, 32, 70)
    strided["x"] = make.randn(5, 2, 40)[:, :, 4:36]
    return [
        _arguments(make, 1, 4, 64, 12),
        _arguments(make, 9, 2, 48, 16),
        _arguments(make, 1, 1, 512, 20),
        strided,
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for tokens in (1, 64, 4096):
        yield Workload(
            f"Flash, T={tokens}",
            functools.partial(_arguments, make, tokens, 8, 4096, 1024),
            read_write=2 * 8 * 4096 * 1024 if tokens < 512 else 0,
            operations=2 * tokens * 8 * 4096 * 1024 if tokens >= 512 else 0,
            compiled=True,
        )


cases = Cases(_small, _workloads)
