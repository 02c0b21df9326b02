"""Cases of all products, whose weights are what a step must read."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.cases import EPS, LARGE, SMALL, Arguments, Cases, Dimensions, Maker, Workload

_TOKENS = (1, 2, 8, 64)
_ALSO_COMPILED = [
    (SMALL, 8, 2 * SMALL.intermediate),
    (LARGE, 64, 2 * LARGE.intermediate),
]
"""Models, rows and outputs for which other kernels are chosen."""


def _linear(make: Maker) -> list[Arguments]:
    return [
        {"x": make.randn(rows, 64), "weight": make.randn(96, 64) / 8, "bias": bias}
        for rows, bias in ((1, None), (5, make.randn(96)))
    ]


def _norm_linear(make: Maker) -> list[Arguments]:
    return [
        {
            "x": make.randn(rows, 64),
            "norm_weight": make.randn(64, dtype=gain),
            "eps": EPS,
            "weight": make.randn(96, 64) / 8,
            "bias": bias,
        }
        for gain in (None, torch.float32)
        for rows, bias in ((1, None), (1, make.randn(96)), (5, None))
    ]


def _linear_add(make: Maker) -> list[Arguments]:
    return [{**each, "residual": make.randn(len(each["x"]), 96)} for each in _linear(make)]


def _linear_into(make: Maker) -> list[Arguments]:
    return [
        {"x": make.randn(rows, 64), "weight": make.randn(96, 64) / 8, "out": make.randn(rows, 96)}
        for rows in (1, 5)
    ]


def _workload(
    make: Maker, model: Dimensions, tokens: int, outputs: int, inputs: int, *others: str
) -> Workload:
    """``others``: what the op takes beside ``x`` and ``weight``."""

    def arguments() -> Arguments:
        made = {
            "bias": lambda: None,
            "norm_weight": lambda: make.randn(inputs),
            "eps": lambda: EPS,
            "residual": lambda: make.randn(tokens, outputs),
            "out": lambda: make.randn(tokens, outputs),
        }
        return {
            "x": make.randn(tokens, inputs),
            "weight": make.randn(outputs, inputs) / inputs**0.5,
            **{name: made[name]() for name in others},
        }

    return Workload(
        f"{model.name}, T={tokens}, {inputs} to {outputs}",
        arguments,
        read_write=2 * outputs * inputs,
        compiled=(model is SMALL and tokens in (1, 2, 64))
        or (model, tokens, outputs) in _ALSO_COMPILED,
    )


def _linear_workloads(make: Maker) -> Iterator[Workload]:
    for tokens in _TOKENS:
        yield _workload(make, SMALL, tokens, SMALL.vocab // 128, SMALL.hidden, "bias")


def _norm_linear_workloads(make: Maker) -> Iterator[Workload]:
    for model in make.models:
        for tokens in _TOKENS:
            yield _workload(
                make, model, tokens, model.projected, model.hidden, "norm_weight", "eps", "bias"
            )


def _norm_gated_linear_workloads(make: Maker) -> Iterator[Workload]:
    for model in make.models:
        for tokens in _TOKENS:
            outputs = 2 * model.intermediate
            yield _workload(
                make, model, tokens, outputs, model.hidden, "norm_weight", "eps", "bias"
            )


def _linear_add_workloads(make: Maker) -> Iterator[Workload]:
    for model in make.models:
        for tokens in _TOKENS:
            for inputs in (model.heads * model.head_size, model.intermediate):
                yield _workload(make, model, tokens, model.hidden, inputs, "bias", "residual")


def _gated_linear_workloads(make: Maker) -> Iterator[Workload]:
    for model in make.models:
        for tokens in _TOKENS:
            yield _workload(make, model, tokens, 2 * model.intermediate, model.hidden, "bias")


linear = Cases(_linear, _linear_workloads)
gated_linear = Cases(_linear, _gated_linear_workloads)
norm_linear = Cases(_norm_linear, _norm_linear_workloads)
norm_gated_linear = Cases(_norm_linear, _norm_gated_linear_workloads)
linear_add = Cases(_linear_add, _linear_add_workloads)
linear_into = Cases(_linear_into)
