from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.cases import LARGE, SMALL, Arguments, Cases, Dimensions, Maker, Workload

BLOCK = 128


def _arguments(
    make: Maker, rows: int, outputs: int, inputs: int, block_n: int, block_k: int, bias: bool
) -> Arguments:
    blocks = -(-outputs // block_n), -(-inputs // block_k)
    return {
        "x": make.randn(rows, inputs),
        "weight": make.randn(outputs, inputs, dtype=torch.float8_e4m3fn),
        "scale": (make.randn(*blocks, dtype=torch.float32).abs() + 0.1) / inputs**0.5,
        "bias": make.randn(outputs) if bias else None,
        "block_n": block_n,
        "block_k": block_k,
    }


def _small(make: Maker) -> list[Arguments]:
    sizes = [
        (256, 512, BLOCK, BLOCK),
        (200, 200, BLOCK, BLOCK),  # blocks that are cut off
        (96, 256, 32, BLOCK),  # parts of a merged product that are smaller than a block
        (112, 256, 1, 256),
        (40, 72, 1, 72),
    ]
    found = [_arguments(make, rows, *each, bias=rows > 1) for each in sizes for rows in (1, 5)]
    found.append(_arguments(make, 130, *sizes[1], bias=False))
    found.append({**found[1], "x": make.randn(5, 3 * 512)[:, 512:1024]})
    silent = _arguments(make, 3, *sizes[0], bias=False)
    silent["x"][1] = 0
    silent["x"][2, :BLOCK] = 0
    return [*found, silent]


def _workload(
    make: Maker, model: Dimensions, rows: int, outputs: int, inputs: int, blocks: tuple[int, int]
) -> Workload:
    return Workload(
        f"{model.name}, T={rows}, {inputs} to {outputs}, "
        + ("channels" if blocks[0] == 1 else "blocks"),
        lambda: _arguments(make, rows, outputs, inputs, *blocks, bias=False),
        read_write=outputs * inputs,
        compiled=model is SMALL and rows in (1, 64) and outputs == model.projected,
    )


def _workloads(make: Maker) -> Iterator[Workload]:
    for model in (SMALL, LARGE):
        sizes = model.products
        for rows in (1, 8, 64):
            for outputs, inputs in sizes:
                yield _workload(make, model, rows, outputs, inputs, (BLOCK, BLOCK))
            yield _workload(make, model, rows, *sizes[0], (1, sizes[0][1]))


cases = Cases(_small, _workloads)
