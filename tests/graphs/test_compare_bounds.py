"""What other roundings do is right though a number comes out nearly zero, and no more is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reprise.cache.spec import STATE, LayerCache, Rows
from reprise.errors import ModelError
from reprise.graphs.compare import difference, differs, relative_difference

EPS = torch.finfo(torch.float32).eps
BOUND = 16 * EPS
"""The least that compiled code may differ by."""
seeds = st.integers(0, 2**31 - 1)


def heads(seed: int, order: int) -> Tensor:
    """[H, V, K] float32: sums of values times keys over tokens, as a state has them, the products
    behind both summed in one of two orders. Components of keys and values cancel."""
    generator = torch.Generator().manual_seed(seed)
    count, size, width, tokens = 3, 8, 32, 5

    def product(weight: Tensor, x: Tensor) -> Tensor:
        terms = weight.unsqueeze(0) * x.unsqueeze(1)  # [T, size, width]
        if order:
            terms = terms.flip(-1)
        total = torch.zeros(terms.shape[:-1])
        for term in terms.unbind(-1):
            total += term
        return total

    found = []
    for _ in range(count):
        x = torch.randn(tokens, width, generator=generator)
        weights = torch.randn(2, size, width, generator=generator)
        # Behind the first half comes what takes all of it away, but for a millionth.
        for weight in weights:
            weight[0, width // 2 :] = -weight[0, : width // 2]
        x[:, width // 2 :] = x[:, : width // 2] * (1 + 1e-6)
        values, keys = product(weights[0], x), product(weights[1], x)
        found.append((values.unsqueeze(2) * keys.unsqueeze(1)).sum(0))
    return torch.stack(found)


@given(seeds)
def test_a_state_that_was_summed_in_another_order_is_right(seed: int) -> None:
    one, other = heads(seed, 0), heads(seed, 1)
    # Row by row it looks as if the two had little in common: that was a false alarm.
    assert relative_difference(one, other) > 100 * BOUND
    rows = one.flatten(1), other.flatten(1)
    assert relative_difference(*rows) < BOUND
    assert not bool(differs(*rows, BOUND))


@given(seeds, st.integers(0, 2), st.integers(0, 7), st.integers(0, 7), st.booleans())
def test_what_is_wrong_by_twice_the_bound_is_found_in_any_place(
    seed: int, head: int, row: int, column: int, down: bool
) -> None:
    one = heads(seed, 0)
    got = one.clone()
    got[head, row, column] += (-2 if down else 2) * BOUND * float(one[head].abs().max())
    assert bool(differs(one.flatten(1), got.flatten(1), BOUND))
    found = difference("heads", one.flatten(1), got.flatten(1), BOUND)
    assert found is not None
    assert (found.wrong, found.elements) == (1, one.numel())


@given(seeds, st.integers(0, 2), st.integers(0, 2))
def test_a_head_of_another_a_forgotten_one_and_one_of_twice_the_size_are_wrong(
    seed: int, head: int, fault: int
) -> None:
    one = heads(seed, 0)
    got = one.clone()
    got[head] = (one[(head + 1) % 3], torch.zeros_like(one[head]), 2 * one[head])[fault]
    assert bool(differs(one.flatten(1), got.flatten(1), BOUND))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_underflow_does_is_right_and_anything_more_is_wrong(dtype: torch.dtype) -> None:
    """A row of the smallest numbers: flushed, or rounded to the one beside."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    row = torch.tensor([[least, 3 * least, -7 * least, 0.0]], dtype=torch.float64).to(dtype)
    flushed, beside = torch.zeros_like(row), row.clone()
    beside[0, 1] = 4 * least
    right = [beside] if dtype == torch.float16 else [beside, flushed]
    for got in right:
        assert bool(differs(row, got))
        assert not bool(differs(row, got, BOUND))
        assert difference("row", row, got, BOUND) is None
        assert relative_difference(row, got) == 0
        exact = difference("row", row, got)
        assert exact is not None
        assert exact.wrong == int((row != got).sum())
        assert exact.largest > 0
    allowed = max(least, torch.finfo(torch.float32).smallest_normal)
    for factor, wrong in ((0.5, False), (4.0, True)):
        zeros = torch.zeros(1, 4, dtype=dtype)
        got = zeros.clone()
        got[0, 2] = factor * allowed
        assert bool(differs(zeros, got, BOUND)) == wrong


def test_dimensions_of_one_scale_are_those_of_the_rows() -> None:
    LayerCache(STATE, heads=Rows((2, 4, 8), torch.float32, together=3))
    for together in (0, 4):
        with pytest.raises(ModelError, match=f"cache heads: together={together} of rows"):
            LayerCache(STATE, heads=Rows((2, 4, 8), torch.float32, together=together))
