from __future__ import annotations

import functools
from collections.abc import Iterator

from reprise.ops.cases import Arguments, Cases, Maker, Workload
from reprise.ops.hyper_connection.cases import FLASH, STREAMS
from reprise.ops.hyper_connection.cases import arguments as between


def _arguments(make: Maker, tokens: int, size: int) -> Arguments:
    found = between(make, tokens, size)
    for name in ("gain", "iterations"):
        del found[name]
    found["fn"], found["base"] = found["fn"][:STREAMS], found["base"][:STREAMS]
    return {**found, "scale": found["scale"][:1]}


def _small(make: Maker) -> list[Arguments]:
    return [_arguments(make, 1, 64), _arguments(make, 9, 48)]


def _workloads(make: Maker) -> Iterator[Workload]:
    for tokens in (1, 64):
        yield Workload(
            f"Flash, T={tokens}",
            functools.partial(_arguments, make, tokens, FLASH),
            read_write=2 * tokens * FLASH * (2 * STREAMS + 2) + 16 * STREAMS * FLASH,
            compiled=True,
        )


cases = Cases(_small, _workloads)
