from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.cases import LARGE, SMALL, Arguments, Cases, Dimensions, Maker, Workload


def _arguments(
    make: Maker, rows: int, outputs: int, inputs: int, group: int, zeros: bool, bias: bool
) -> Arguments:
    words, groups = -(-inputs // 8), -(-inputs // group)
    return {
        "x": make.randn(rows, inputs),
        "packed": make.randint(256, outputs, 4 * words, dtype=torch.uint8).view(torch.int32),
        "scales": (make.randn(outputs, groups).abs() + 0.1) / (8 * inputs**0.5),
        "zeros": make.randint(16, outputs, groups, dtype=torch.uint8) if zeros else None,
        "bias": make.randn(outputs) if bias else None,
        "group": group,
    }


def _small(make: Maker) -> list[Arguments]:
    sizes = [
        (96, 256, 128),
        (48, 192, 64),
        (80, 64, 32),
        (40, 80, 80),  # one scale an output
        (24, 100, 64),  # a group and a word that are cut off
    ]
    found = [
        _arguments(make, rows, *each, zeros=(number % 2 == 0) == (rows > 1), bias=rows > 1)
        for number, each in enumerate(sizes)
        for rows in (1, 5)
    ]
    found.append(_arguments(make, 130, *sizes[0], zeros=True, bias=False))
    found.append({**found[1], "x": make.randn(5, 3 * 256)[:, 256:512]})
    return found


def _workload(
    make: Maker, model: Dimensions, rows: int, outputs: int, inputs: int, zeros: bool
) -> Workload:
    return Workload(
        f"{model.name}, T={rows}, {inputs} to {outputs}, {'zeros' if zeros else 'symmetric'}",
        lambda: _arguments(make, rows, outputs, inputs, 128, zeros, bias=False),
        read_write=outputs * inputs // 2,
        compiled=model is SMALL and outputs == model.projected and not zeros,
    )


def _workloads(make: Maker) -> Iterator[Workload]:
    for model in (SMALL, LARGE):
        sizes = model.products
        for rows in (1, 8, 64):
            for outputs, inputs in sizes:
                yield _workload(make, model, rows, outputs, inputs, zeros=False)
            yield _workload(make, model, rows, *sizes[0], zeros=True)


cases = Cases(_small, _workloads)
