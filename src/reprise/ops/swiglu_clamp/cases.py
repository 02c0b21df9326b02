import functools
from collections.abc import Iterator

from reprise.ops.cases import Arguments, Cases, Maker, Workload

FLASH = 2048
"""Width of an expert of DeepSeek-V4-Flash."""


def _arguments(make: Maker, rows: int, size: int, limit: float) -> Arguments:
    return {"x": 3 * make.randn(rows, 2 * size), "limit": limit}


def _small(make: Maker) -> list[Arguments]:
    return [_arguments(make, 1, 96, 1.0), _arguments(make, 9, 96, 2.5)]


def _workloads(make: Maker) -> Iterator[Workload]:
    for tokens in (1, 64, 8192):
        yield Workload(
            f"Flash, T={tokens}",
            functools.partial(_arguments, make, tokens, FLASH, 10.0),
            read_write=2 * 3 * tokens * FLASH,
            compiled=tokens <= 64,
        )


cases = Cases(_small, _workloads)
