from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.cases import Arguments, Cases, Maker, Workload


def _small(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []  # words are words
    words = make.randn(2, 9, 200).view(torch.int32)
    return [
        {"words": words, "units": None},
        {"words": words, "units": make.ints([8, 0, 3])},
        {"words": make.randn(1, 1, 70_000).view(torch.int32), "units": None},
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for shape, chosen, what in (
        ((1, 1, 1 << 20), None, "one buffer"),
        ((2, 40, 8192), None, "caches"),
        ((2, 40, 8192), 20, "20 blocks of caches"),
    ):

        def arguments(
            shape: tuple[int, int, int] = shape, chosen: int | None = chosen
        ) -> Arguments:
            units = None if chosen is None else make.ints(range(chosen))
            return {
                "words": make.randn(*shape, dtype=torch.float32).view(torch.int32),
                "units": units,
            }

        regions, count, length = shape
        yield Workload(
            f"{what}, {regions} x {chosen or count} x {length} words",
            arguments,
            read_write=4 * regions * (chosen or count) * length,
            exact=True,
            compiled=True,
        )


cases = Cases(_small, _workloads)
