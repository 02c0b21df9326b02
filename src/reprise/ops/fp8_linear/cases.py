from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from reprise.ops.cases import EPS, LARGE, SMALL, Arguments, Cases, Dimensions, Maker, Workload

BLOCK = 128
_ALSO_COMPILED = [
    (SMALL, 64, SMALL.projected), (LARGE, 64, 2 * LARGE.intermediate),
    (LARGE, 1, 2 * LARGE.intermediate), (LARGE, 1, LARGE.hidden),
]  # fmt: skip
"""Models, rows and outputs for which other sizes are chosen."""


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
    # As many as other kernels take, and as the BLAS does.
    found += [_arguments(make, rows, *each, bias=True) for each in sizes[::3] for rows in (33, 70)]
    found.append({**found[1], "x": make.randn(5, 3 * 512)[:, 512:1024]})
    silent = _arguments(make, 3, *sizes[0], bias=False)
    silent["x"][1] = 0
    silent["x"][2, :BLOCK] = 0
    return [*found, silent]


def _with_norm(arguments: Arguments, make: Maker) -> Arguments:
    return {**arguments, "norm_weight": make.randn(arguments["x"].shape[1]), "eps": EPS}


def _with_residual(arguments: Arguments, make: Maker) -> Arguments:
    rows, outputs = len(arguments["x"]), len(arguments["weight"])
    return {**arguments, "residual": make.randn(rows, outputs)}


def _cases(
    sizes: Callable[[Dimensions], list[tuple[int, int]]],
    more: Callable[[Arguments, Maker], Arguments] = lambda arguments, make: arguments,
    *,
    channels: bool = False,
) -> Cases:
    """``sizes``: outputs and inputs of a model's products. ``more``: arguments to add."""

    def workload(
        make: Maker, model: Dimensions, rows: int, outputs: int, inputs: int, block_n: int
    ) -> Workload:
        block_k = BLOCK if block_n > 1 else inputs
        return Workload(
            f"{model.name}, T={rows}, {inputs} to {outputs}, "
            + ("blocks" if block_n > 1 else "channels"),
            lambda: more(
                _arguments(make, rows, outputs, inputs, block_n, block_k, bias=False), make
            ),
            read_write=outputs * inputs,
            compiled=(model is SMALL and rows == 1) or (model, rows, outputs) in _ALSO_COMPILED,
        )

    def workloads(make: Maker) -> Iterator[Workload]:
        for model in make.models:
            for rows in (1, 8, 64):
                for each in sizes(model):
                    yield workload(make, model, rows, *each, BLOCK)
                    if channels:
                        yield workload(make, model, rows, *each, 1)

    return Cases(lambda make: [more(each, make) for each in _small(make)], workloads)


fp8_linear = _cases(lambda model: model.products[:1], channels=True)
fp8_norm_linear = _cases(lambda model: model.products[:1], _with_norm)
fp8_norm_gated_linear = _cases(lambda model: model.products[2:3], _with_norm)
fp8_linear_add = _cases(lambda model: model.products[1::2], _with_residual)
