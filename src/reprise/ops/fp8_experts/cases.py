"""Cases of experts of eight bits: blocks, blocks that are cut off, channels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reprise.ops.cases import Arguments, Cases, Maker, Workload
from reprise.ops.experts.cases import A3B, Mixture, spread

BLOCK = 128


def _arguments(
    make: Maker, sizes: Mixture, ids: Tensor, block_n: int, block_k: int, limit: float = 0.0
) -> Arguments:
    hidden, inner, count = sizes.hidden, sizes.intermediate, sizes.experts

    def scale(outputs: int, inputs: int) -> Tensor:
        blocks = -(-outputs // block_n), -(-inputs // block_k) if block_k else 1
        values = make.randn(count, *blocks, dtype=torch.float32).abs() + 0.1
        return values / inputs**0.5

    return {
        "x": make.randn(len(ids), hidden),
        "weights": make.randn(*ids.shape, dtype=torch.float32).abs() / ids.shape[1],
        "ids": ids,
        "gate_up": make.randn(count, 2 * inner, hidden, dtype=torch.float8_e4m3fn),
        "gate_up_scale": scale(2 * inner, hidden),
        "down": make.randn(count, hidden, inner, dtype=torch.float8_e4m3fn),
        "down_scale": scale(hidden, inner),
        "block_n": block_n,
        "block_k": block_k,
        "limit": limit,
    }


def _small(make: Maker) -> list[Arguments]:
    whole = Mixture("whole", 256, 128, 4, 2)
    odd = Mixture("odd", 200, 72, 5, 2)
    crowd = make.ints([1, 3, 3, 0, *[0, 3] * 20], torch.int32).view(22, 2)
    return [
        _arguments(make, whole, spread(make, whole, 1), BLOCK, BLOCK),
        _arguments(make, whole, spread(make, whole, 5, live=4), BLOCK, BLOCK),
        _arguments(make, whole, crowd, BLOCK, BLOCK),
        _arguments(make, odd, spread(make, odd, 3), 8, BLOCK),
        _arguments(make, odd, spread(make, odd, 3), 1, 0),
        _arguments(make, whole, spread(make, whole, 1), 1, 0),
        _arguments(make, whole, spread(make, whole, 3), 32, BLOCK, 0.5),
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    sizes = A3B
    per_expert = 3 * sizes.hidden * sizes.intermediate
    for rows in (1, 8, 64, 4096):
        hit = sizes.experts * (1 - (1 - sizes.top / sizes.experts) ** rows)

        def arguments(rows: int = rows) -> Arguments:
            return _arguments(make, sizes, spread(make, sizes, rows), BLOCK, BLOCK)

        yield Workload(
            f"{sizes.name}, T={rows}",
            arguments,
            read_write=int(per_expert * hit) if rows < 512 else 0,
            operations=2 * rows * sizes.top * per_expert if rows >= 512 else 0,
            compiled=rows in (1, 64, 4096),
        )


cases = Cases(_small, _workloads, coded_between=True)
