"""Every feature of an engine under every disturbance: see :mod:`matrix`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matrix
import pytest
from helpers import TinyModels, token_ids


@pytest.fixture(scope="module")
def alone(tiny: TinyModels, device: str) -> matrix.Alone:
    return matrix.Alone(tiny, device)


CASES = [
    pytest.param(
        features, name, id=f"{features}: {name}",
        marks=[] if features in matrix.COVERING else [pytest.mark.long],
    )
    for features in dict.fromkeys([*matrix.COVERING, *matrix.PRODUCT])
    for name in matrix.DISTURBANCES
]  # fmt: skip


@pytest.mark.parametrize(("features", "disturbance"), CASES)
def test_same_tokens(
    alone: matrix.Alone, device: str, features: matrix.Features, disturbance: str
) -> None:
    outputs = matrix.DISTURBANCES[disturbance](alone.case(features))
    expected = alone.tokens(features)
    assert [list(each.outputs[0].token_ids) for each in outputs] == expected


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(each, id=str(each), marks=[pytest.mark.long] * (each.executor != "full"))
        for each in matrix.COVERING
        # What moves a row by a rounding of bfloat16 may give it the next code, which is far more.
        if each.model != matrix.CODES
    ],
)
def test_bfloat16_gives_the_same_tokens_where_rounding_decides_nothing(
    alone: matrix.Alone, device: str, features: matrix.Features, pytestconfig: pytest.Config
) -> None:
    """Short runs have the disturbances that change shapes most, by which kernels round."""
    long = device != "cpu" or pytestconfig.getoption("--long")
    names = list(matrix.DISTURBANCES) if long else ["bucket", "chunking", "preemption"]
    model = alone.model(features, decisive=True)
    subjects = matrix.decided(model, device)
    expected = matrix.alone(model, device, subjects, dtype="bfloat16")
    case = replace(alone.case(features, model), subjects=subjects, dtype="bfloat16")
    found = {name: token_ids(matrix.DISTURBANCES[name](case)) for name in names}
    different = {
        name: [number for number, each in enumerate(got) if each != expected[number]]
        for name, got in found.items() if got != expected
    }  # fmt: skip
    count = len(subjects) * len(found)
    print(f"{features}: {sum(map(len, different.values()))} of {count} requests differ")
    assert not different


def test_the_short_set_has_every_feature() -> None:
    names: dict[str, set[Any]] = {
        "executor": set(matrix.EXECUTORS) - {"compiled"},
        # The latent one takes ten times as long, and has its own tests of drafts and prefixes.
        "model": set(matrix.MODELS) - {"latent"},
        "drafts": set(matrix.DRAFTS),
        "drafter": set(matrix.DRAFTERS),
    }
    for name, values in names.items():
        assert {getattr(each, name) for each in matrix.COVERING} == values
