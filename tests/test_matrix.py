"""Every feature of an engine under every disturbance: see :mod:`matrix`."""

from __future__ import annotations

from typing import Any

import matrix
import pytest
from helpers import TinyModels, make_llm

from reprise.errors import ConfigError


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
    model = alone.model(features)
    outputs = matrix.DISTURBANCES[disturbance](features, model, device)
    expected = alone.tokens(features)
    assert [list(each.outputs[0].token_ids) for each in outputs] == expected


def test_drafts_behind_a_state_are_refused_by_name(alone: matrix.Alone, device: str) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 2}
    model = alone.model(matrix.Features("none", matrix.HYBRID, 0))
    with pytest.raises(ConfigError, match=r"speculative_config: .* a recurrent state"):
        make_llm(model, device, speculative_config=config)


@pytest.mark.parametrize("features", matrix.COVERING, ids=str)
def test_bfloat16_differs_where_rounding_decides(
    tiny: TinyModels, device: str, features: matrix.Features
) -> None:
    """On an accelerator, where kernels of other shapes round otherwise."""
    if device == "cpu":
        pytest.skip("a CPU's test is the one in float32")
    alone = matrix.Alone(tiny, device, dtype="bfloat16")
    model, differing, gaps = alone.model(features), 0, []
    for disturbance in matrix.DISTURBANCES.values():
        outputs = disturbance(features, model, device, dtype="bfloat16")
        for output, expected, (prompt, params) in zip(
            outputs, alone.tokens(features), matrix.SUBJECTS, strict=True
        ):
            got = list(output.outputs[0].token_ids)
            if got == expected:
                continue
            differing += 1
            pairs = zip(got, expected, strict=False)
            place = next(n for n, (mine, right) in enumerate(pairs) if mine != right)
            logits = model.logits([*prompt, *expected[:place]])[-1]
            if params.temperature == 0 and params.repetition_penalty == 1:
                gaps.append(float((logits[expected[place]] - logits[got[place]]).abs()))
    count = len(matrix.SUBJECTS) * len(matrix.DISTURBANCES)
    print(f"{features}: {differing} of {count} requests differ, at gaps of {gaps}")
    assert differing <= max(1, matrix.BFLOAT16_SHARE * count)
    assert all(each < matrix.BFLOAT16_GAP for each in gaps)


def test_the_short_set_has_every_feature() -> None:
    names: dict[str, set[Any]] = {
        "executor": set(matrix.EXECUTORS) - {"compiled"},
        "model": set(matrix.MODELS),
        "drafts": set(matrix.DRAFTS),
    }
    for name, values in names.items():
        assert {getattr(each, name) for each in matrix.COVERING} == values
