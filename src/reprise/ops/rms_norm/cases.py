from collections.abc import Iterator

import torch

from reprise.ops.cases import EPS, SMALL, Arguments, Cases, Maker, Workload


def _small(make: Maker) -> list[Arguments]:
    inputs = make.randn(1, 64), make.randn(7, 3, 64), make.randn(3, 9, 64)[:, 2:5]
    wide = make.randn(64, dtype=torch.float32)
    return [
        *({"x": x, "weight": make.randn(64), "eps": EPS} for x in inputs),
        {"x": inputs[1], "weight": wide, "eps": EPS},
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for model in make.models:
        for tokens in (1, 64, 8192):
            size = model.hidden

            def arguments(tokens: int = tokens, size: int = size) -> Arguments:
                return {"x": make.randn(tokens, size), "weight": make.randn(size), "eps": EPS}

            yield Workload(
                f"{model.name}, T={tokens}",
                arguments,
                read_write=2 * 2 * tokens * size,
                compiled=model is SMALL and tokens <= 64,
            )


cases = Cases(_small, _workloads)
