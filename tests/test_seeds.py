"""The tests' own draws."""

from __future__ import annotations

import random

import numpy as np
import pytest
import seeds
import torch
from hypothesis import given
from hypothesis import strategies as st


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), float(torch.rand(()))


@pytest.fixture(scope="module", params=[0, 1])
def shared() -> tuple[float, float, float]:
    return draws()


@pytest.fixture
def drawn() -> tuple[float, float, float]:
    return draws()


SEEN: list[tuple[float, float, float]] = []


@pytest.mark.parametrize("case", [0, 1])
def test_a_test_draws_what_its_name_says(
    request: pytest.FixtureRequest, drawn: tuple[float, float, float], case: int
) -> None:
    seeds.seed(request.node.nodeid)
    assert drawn == draws()


def test_what_is_shared_has_draws_of_its_own(
    request: pytest.FixtureRequest, shared: tuple[float, float, float]
) -> None:
    SEEN.append(shared)
    mine = draws()
    seeds.seed(request.node.nodeid)
    assert mine == draws()
    assert len({*SEEN, mine}) == len(SEEN) + 1
    before = draws()
    with seeds.seeded("a fixture that is asked for now"):
        within = draws()
    after = draws()
    seeds.seed(request.node.nodeid)
    assert [draws(), draws(), draws()] == [mine, before, after]
    with seeds.seeded("a fixture that is asked for now"):
        assert draws() == within


@given(st.integers())
def test_each_example_begins_anew(number: int) -> None:
    mine = draws()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert mine == draws()
