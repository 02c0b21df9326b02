"""Cases of experts: rows that share experts, crowds at one of them, padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reprise.ops.cases import Arguments, Cases, Maker, Workload


@dataclass(frozen=True)
class Mixture:
    """Sizes of a layer with experts."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top: int


A3B = Mixture("30B-A3B", 2048, 768, 128, 8)
"""Qwen3's."""


def _arguments(make: Maker, sizes: Mixture, ids: Tensor) -> Arguments:
    hidden, inner, count = sizes.hidden, sizes.intermediate, sizes.experts
    weights = make.randn(*ids.shape, dtype=torch.float32).abs() / ids.shape[1]
    return {
        # Not the weights, which are much larger.
        "x": make.randn(len(ids), hidden) / hidden**0.5,
        "weights": weights,
        "ids": ids,
        "gate_up": make.randn(count, 2 * inner, hidden),
        "down": make.randn(count, hidden, inner),
    }


def spread(make: Maker, sizes: Mixture, rows: int, live: int | None = None) -> Tensor:
    """[rows, top] int32: experts that follow each other from a random one on; none for padding."""
    first = make.randint(sizes.experts, rows, 1)
    step = torch.arange(sizes.top, device=make.device)
    ids = (first + step * (sizes.experts // sizes.top) + step) % sizes.experts
    real = torch.arange(rows, device=make.device).unsqueeze(1) < (rows if live is None else live)
    return torch.where(real, ids, -1).int()


def _experts(make: Maker) -> list[Arguments]:
    clamped = Mixture("clamped", 32, 16, 4, 2)
    return [
        *({**each, "limit": 0.0} for each in _unclamped(make)),
        {**_arguments(make, clamped, spread(make, clamped, 5)), "limit": 0.5},
    ]


def _unclamped(make: Maker) -> list[Arguments]:
    sizes = Mixture("tiny", 64, 32, 8, 3)
    odd = Mixture("odd", 48, 24, 5, 2)
    crowd = make.ints([1, 5, 5, 0, 2, 3, *[0, 5] * 37], torch.int32).view(40, 2)
    return [
        _arguments(make, sizes, spread(make, sizes, 1)),
        _arguments(make, sizes, spread(make, sizes, 6, live=4)),
        _arguments(make, odd, spread(make, odd, 9)),
        # More rows than a tile has, and experts without any.
        _arguments(make, sizes, crowd),
        _arguments(make, sizes, spread(make, sizes, 150, live=131)),
        # Of these experts some are another device's.
        _arguments(make, sizes, make.ints([-3, 9, 1, 7, 8, 0], torch.int32).view(2, 3)),
    ]


def _experts_add(make: Maker) -> list[Arguments]:
    return [{**each, "residual": make.randn(*each["x"].shape)} for each in _unclamped(make)]


def _workloads(make: Maker, add: bool) -> Iterator[Workload]:
    sizes = A3B
    per_expert = 2 * 3 * sizes.hidden * sizes.intermediate
    for rows in (1, 8, 64, 512, 4096):
        # Uniform routing: of each expert, how likely it is that some row goes there.
        hit = sizes.experts * (1 - (1 - sizes.top / sizes.experts) ** rows)

        def arguments(rows: int = rows) -> Arguments:
            found = _arguments(make, sizes, spread(make, sizes, rows))
            more = {"residual": make.randn(rows, sizes.hidden)} if add else {"limit": 0.0}
            return {**found, **more}

        yield Workload(
            f"{sizes.name}, T={rows}",
            arguments,
            read_write=int(per_expert * hit) if rows < 512 else 0,
            operations=rows * sizes.top * per_expert if rows >= 512 else 0,
            compiled=rows in (1, 64, 4096),
        )


experts = Cases(_experts, lambda make: _workloads(make, add=False))
experts_add = Cases(_experts_add, lambda make: _workloads(make, add=True))
