from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from reprise.ops.cases import EPS, SMALL, Arguments, Cases, Dimensions, Maker, Workload


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
    found.append(_arguments(make, 1, 8, 4608, 128, zeros=True, bias=False))  # shares of the inputs
    found.append({**found[1], "x": make.randn(5, 3 * 256)[:, 256:512]})
    return found


def _with_norm(arguments: Arguments, make: Maker) -> Arguments:
    return {**arguments, "norm_weight": make.randn(arguments["x"].shape[1]), "eps": EPS}


def _with_residual(arguments: Arguments, make: Maker) -> Arguments:
    rows, outputs = len(arguments["x"]), len(arguments["packed"])
    return {**arguments, "residual": make.randn(rows, outputs)}


def _cases(
    sizes: Callable[[Dimensions], list[tuple[int, int]]],
    more: Callable[[Arguments, Maker], Arguments] = lambda arguments, make: arguments,
) -> Cases:
    """``sizes``: outputs and inputs of a model's products. ``more``: arguments to add."""

    def workload(
        make: Maker, model: Dimensions, rows: int, outputs: int, inputs: int, zeros: bool
    ) -> Workload:
        return Workload(
            f"{model.name}, T={rows}, {inputs} to {outputs}, {'zeros' if zeros else 'symmetric'}",
            lambda: more(_arguments(make, rows, outputs, inputs, 128, zeros, bias=False), make),
            read_write=outputs * inputs // 2 + outputs * inputs // 128 * (3 if zeros else 2),
            compiled=(model is SMALL and (rows < 64 or outputs == model.projected))
            or (rows == 1 and inputs > 4096),  # programs with shares of the inputs
        )

    def workloads(make: Maker) -> Iterator[Workload]:
        for model in make.models:
            for rows in (1, 8, 64):
                for number, each in enumerate(sizes(model)):
                    yield workload(make, model, rows, *each, zeros=False)
                    if number == 0:
                        yield workload(make, model, rows, *each, zeros=True)

    return Cases(lambda make: [more(each, make) for each in _small(make)], workloads)


w4_linear = _cases(lambda model: model.products[:1])
w4_norm_linear = _cases(lambda model: model.products[:1], _with_norm)
w4_norm_gated_linear = _cases(lambda model: model.products[2:3], _with_norm)
w4_linear_add = _cases(lambda model: model.products[1::2], _with_residual)
