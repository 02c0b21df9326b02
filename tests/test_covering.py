"""What short runs leave out of products."""

from __future__ import annotations

import itertools

import covering
import pytest
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 2), st.data())
def test_all_that_can_meet_meets(sizes: list[int], strength: int, data: st.DataObject) -> None:
    product = itertools.product(*(range(each) for each in sizes))
    cases = [
        [(f"{name}", f"{value}") for name, value in enumerate(each)]
        for each in product
        if data.draw(st.integers(0, 4))  # some cannot be
    ]
    kept = covering.cover(cases, strength)
    meet = {pair for each in cases for pair in itertools.combinations(each, strength)}
    found = {pair for n in kept for pair in itertools.combinations(cases[n], strength)}
    assert found == meet


@pytest.mark.parametrize(("strength", "count"), [(1, 6), (2, 12), (3, 36)])
def test_as_few_as_can_be(strength: int, count: int) -> None:
    cases = [
        [("a", f"{a}"), ("b", f"{b}"), ("c", f"{c}")]
        for a in range(6) for b in range(2) for c in range(3)
    ]  # fmt: skip
    assert len(covering.cover(cases, strength)) <= {2: 1.5}.get(strength, 1) * count
