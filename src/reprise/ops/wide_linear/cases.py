from __future__ import annotations

import functools
from collections.abc import Iterator

from reprise.ops.cases import Arguments, Cases, Maker, Workload


def _arguments(make: Maker, tokens: int, inputs: int, outputs: int) -> Arguments:
    return {"x": make.randn(tokens, inputs) / inputs**0.5, "weight": make.randn(outputs, inputs)}


def _small(make: Maker) -> list[Arguments]:
    strided = _arguments(make, 3, 32, 70)
    strided["x"] = make.randn(3, 40)[:, 4:36]
    return [
        _arguments(make, 1, 64, 24),
        _arguments(make, 9, 48, 40),
        _arguments(make, 2, 512, 20),
        strided,
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for tokens in (1, 64, 4096):
        yield Workload(
            f"Flash, compressed by 4, T={tokens}",
            functools.partial(_arguments, make, tokens, 4096, 2624),
            read_write=2 * 4096 * 2624 if tokens < 512 else 0,
            operations=2 * tokens * 4096 * 2624 if tokens >= 512 else 0,
            compiled=True,
        )


cases = Cases(_small, _workloads)
