"""Every feature of an engine under every disturbance: see :mod:`matrix`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matrix
import pytest
from helpers import TinyModels, token_ids

from reprise.cache import Window
from reprise.layers import compressed_attention
from reprise.ops import OpTable
from reprise.platforms import Platform


@pytest.fixture(scope="module")
def alone(tiny: TinyModels, device: str) -> matrix.Alone:
    return matrix.Alone(tiny, device)


LATENT = matrix.Features("full", "latent", 3)
"""Takes ten times as long as others, so short runs have it under one disturbance."""
CASES = [
    *(pytest.param(each, list(matrix.DISTURBANCES), id=str(each)) for each in matrix.COVERING),
    pytest.param(LATENT, ["chunking"], id=f"{LATENT}: chunking"),
    *(
        pytest.param(each, list(matrix.DISTURBANCES), id=str(each), marks=pytest.mark.long)
        for each in dict.fromkeys(matrix.PRODUCT) if each not in matrix.COVERING
    ),
]  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("features", "disturbances"), CASES)
def test_same_tokens(
    alone: matrix.Alone, features: matrix.Features, disturbances: list[str]
) -> None:
    assert not alone.case(features).different(alone.tokens(features), disturbances)


def test_under_some_disturbances_graphs_answer_and_under_others_they_are_compared(
    alone: matrix.Alone,
) -> None:
    """What a comparison gives is eager execution's: a case where all are compared proves little of
    what graphs compute. In the product each feature meets each disturbance both ways."""
    case = alone.case(matrix.Features("full", "plain", 3))
    compared = {}
    for name in ("bucket", "neighbours"):
        before = sum(each.graph_report().canaries for each in case._kept)
        assert token_ids(case.under(name)) == alone.tokens(case.features)
        report = case._kept[0].graph_report()
        compared[name] = report.canaries - before, report.replays
    assert not case.compares("bucket")
    assert compared["bucket"][0] <= 2, "some are, whatever a step is"
    assert compared["bucket"][1] > 20
    assert case.compares("neighbours")
    assert compared["neighbours"][0] > 10
    ways = {
        (value, name, replace(case, features=features).compares(name))
        for features in matrix.PRODUCT
        for value in (features.executor, features.model, features.drafts, features.drafter)
        for name in matrix.DISTURBANCES
    }  # fmt: skip
    features = (
        len(matrix.EXECUTORS) + len(matrix.MODELS) + len(matrix.DRAFTS) + len(matrix.DRAFTERS)
    )
    assert len(ways) == 2 * len(matrix.DISTURBANCES) * features


class Forgetful(Window):
    """Says that who goes on behind a prefix needs none of it."""

    def resumes(self, length: int, block_size: int) -> range:
        return range(0)


@pytest.mark.long
def test_states_that_a_prefix_comes_without_are_seen(
    alone: matrix.Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the next compressed row is made of is missing then; whoever finds no prefix is right."""
    eager = replace(LATENT, executor="none", drafts=0)
    expected = alone.tokens(eager)

    def of(size: int) -> Window:
        return Forgetful(size) if size == 8 else Window(size)

    monkeypatch.setattr(compressed_attention, "Window", of)
    case = alone.case(eager)
    assert token_ids(case.answers(case.engine(enable_prefix_caching=False))) == expected
    assert token_ids(matrix.chunking(case)) != expected


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(each, id=str(each), marks=[pytest.mark.long] * (each.executor != "full"))
        # What moves a row by a rounding of bfloat16 may give it the next code, which is far more:
        # neither the cache nor the products have codes here.
        for each in [replace(each, format="plain") for each in matrix.COVERING]
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
    different = case.different(expected, names)
    count = len(subjects) * len(names)
    print(
        f"{features}: {sum(map(len, different.values()))} of {count} requests differ, "
        f"margin {matrix.MARGIN} of the largest logit"
    )
    assert not different


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("features", "disturbances"),
    [
        (matrix.Features("none", "plain", 7), ["chunking"]),
        *(
            pytest.param(each, list(matrix.DISTURBANCES), marks=pytest.mark.long)
            for each in matrix.IN_BITS
        ),
    ],
    ids=lambda each: str(each) if isinstance(each, matrix.Features) else f"{len(each)}",
)
def test_batch_invariant_gives_the_same_bits(
    alone: matrix.Alone,
    device: str,
    platform: Platform,
    features: matrix.Features,
    disturbances: list[str],
) -> None:
    """Without a margin, in bfloat16, whatever rounding could decide."""
    if not OpTable(platform, batch_invariant=True).candidates["linear"]:
        pytest.skip("no implementation of products promises it here")
    subjects, options = matrix.in_bits(), {"batch_invariant": True}
    case = replace(alone.case(features), subjects=subjects, dtype="bfloat16", options=options)
    plain = replace(case, features=matrix.Features("none", features.model, 0), draft=None)
    llm = plain.engine(enable_prefix_caching=False)
    expected = [llm.generate([{"prompt_token_ids": p}], s, use_tqdm=False)[0] for p, s in subjects]
    assert not case.different(matrix.bits(expected), disturbances, of=matrix.bits)


def test_the_short_set_has_every_feature() -> None:
    names: dict[str, set[Any]] = {
        "executor": set(matrix.EXECUTORS) - {"compiled"},
        "model": set(matrix.MODELS) - {LATENT.model},
        "drafts": set(matrix.DRAFTS),
        "drafter": set(matrix.DRAFTERS),
    }
    for name, values in names.items():
        assert {getattr(each, name) for each in matrix.COVERING} == values
