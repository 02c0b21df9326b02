from collections.abc import Iterator

import torch

from reprise.ops.cases import EPS, Arguments, Cases, Maker, Workload


def _arguments(make: Maker, tokens: int, heads: int, size: int) -> Arguments:
    # The gate is a part of a wider product.
    gate = make.randn(tokens, 2 * heads * size)[:, heads * size :]
    weight = make.randn(size, dtype=torch.float32)
    return {"x": make.randn(tokens, heads, size), "gate": gate, "weight": weight, "eps": EPS}


def _small(make: Maker) -> list[Arguments]:
    return [_arguments(make, *shape) for shape in ((1, 3, 16), (5, 4, 24))]


def _workloads(make: Maker) -> Iterator[Workload]:
    for heads, tokens in ((8, 128), (32, 1), (32, 64), (32, 8192)):

        def arguments(tokens: int = tokens, heads: int = heads) -> Arguments:
            return _arguments(make, tokens, heads, 128)

        yield Workload(
            f"{heads} heads, T={tokens}",
            arguments,
            read_write=2 * 3 * tokens * heads * 128,
            compiled=tokens <= 64,
        )


cases = Cases(_small, _workloads)
