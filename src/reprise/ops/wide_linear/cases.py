from __future__ import annotations

import functools
from collections.abc import Iterator

from reprise.ops.cases import Arguments, Cases, Maker, Workload


def _arguments(make: Maker, tokens: int, inputs: int, outputs: int) -> Arguments:
    return {"x": make.randn(tokens, inputs) / inputs**0.5, "weight": make.randn(outputs, inputs)}


def _small(make: Maker) -> list[Arguments]:
    return [_arguments(make, 1, 64, 24), _arguments(make, 9, 48, 40)]


def _workloads(make: Maker) -> Iterator[Workload]:
    for tokens in (1, 64):
        yield Workload(
            f"Flash, compressed by 4, T={tokens}",
            functools.partial(_arguments, make, tokens, 4096, 2624),
            read_write=2 * 4096 * 2624,
        )


cases = Cases(_small, _workloads)
