from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from reprise.ops.cases import Arguments, Cases, Maker, Workload
from reprise.ops.experts.cases import Mixture, spread

FLASH = Mixture("V4-Flash", 4096, 2048, 256, 6)


def _arguments(make: Maker, sizes: Mixture, rows: int, live: int, limit: float) -> Arguments:
    hidden, inner, count = sizes.hidden, sizes.intermediate, sizes.experts
    ids = spread(make, sizes, rows, live)

    def stack(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        codes = make.randint(256, count, outputs, inputs // 2, dtype=torch.uint8)
        scale = make.randint(4, count, outputs, inputs // 32, dtype=torch.uint8) + 122
        return codes.view(torch.int8), scale

    gate_up, gate_up_scale = stack(2 * inner, hidden)
    down, down_scale = stack(hidden, inner)
    return {
        "x": make.randn(rows, hidden),
        "weights": make.randn(*ids.shape, dtype=torch.float32).abs() / ids.shape[1],
        "ids": ids,
        "gate_up": gate_up,
        "gate_up_scale": gate_up_scale,
        "down": down,
        "down_scale": down_scale,
        "limit": limit,
    }


def _small(make: Maker) -> list[Arguments]:
    sizes = Mixture("small", 64, 32, 6, 2)
    odd = Mixture("odd", 96, 160, 5, 3)
    deep = Mixture("deep", 512, 32, 2, 1)
    return [
        _arguments(make, sizes, 1, 1, 0.0),
        _arguments(make, sizes, 7, 5, 1.5),
        _arguments(make, odd, 19, 19, 2.5),
        _arguments(make, deep, 3, 3, 0.0),
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    per_expert = 3 * FLASH.hidden * FLASH.intermediate
    for rows in (1, 8, 64, 4096):
        # Uniform routing: of each expert, how likely it is that some row goes there.
        hit = FLASH.experts * (1 - (1 - FLASH.top / FLASH.experts) ** rows)
        yield Workload(
            f"{FLASH.name}, T={rows}",
            functools.partial(_arguments, make, FLASH, rows, rows, 10.0),
            read_write=int(hit * per_expert * 17 / 32) if rows < 512 else 0,
            operations=2 * rows * FLASH.top * per_expert if rows >= 512 else 0,
            compiled=rows != 8,
        )


cases = Cases(_small, _workloads)
