"""Rows of eight bits: bits where graphs are exact, else what codes stand for, one step allowed."""

from __future__ import annotations

import pytest
import torch

from reprise.graphs import compare
from reprise.graphs.compare import Coded, difference, differs, relative_difference
from reprise.ops.fp8_rows import dequantise, quantise

BOUND = 1e-3


def rows() -> tuple[torch.Tensor, Coded]:
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    x *= 2.0 ** torch.arange(5).view(5, 1, 1)
    return x, Coded(*quantise(x, torch.float8_e4m3fn))


def test_the_next_code_is_right_and_the_one_after_it_is_not() -> None:
    _, expected = rows()
    codes = expected.codes.view(torch.uint8).clone()
    place = (1, 2, 1, 7)
    for steps, wrong in ((1, False), (2, True)):
        moved = codes.clone()
        # Towards zero: upwards the largest would become NaN.
        moved[place] -= steps
        got = Coded(moved.view(torch.float8_e4m3fn), expected.scales)
        assert bool(differs(expected, got, BOUND)) == wrong
        found = difference("rows", expected, got, BOUND)
        assert (found is not None) == wrong
        if found is not None:
            assert (found.wrong, found.elements) == (1, codes.numel())
        # Bit by bit either is a difference.
        assert bool(differs(expected.codes, got.codes))


def test_a_row_that_is_rounded_once_more_is_right() -> None:
    x, expected = rows()
    again = Coded(*quantise(x * (1 + 1e-5), torch.float8_e4m3fn))
    assert bool(differs(expected.codes, again.codes)) or bool(
        differs(expected.scales, again.scales)
    )
    assert not bool(differs(expected, again, BOUND))
    assert relative_difference(expected, again) < 1e-4


@pytest.mark.parametrize("what", ["twice", "of the head beside it", "of the token before"])
def test_a_wrong_scale_is_wrong(what: str) -> None:
    _, expected = rows()
    wrong = {
        "twice": expected.scales * 2,
        "of the head beside it": expected.scales.roll(1, dims=2),
        "of the token before": expected.scales.roll(1, dims=1),
    }[what]
    got = Coded(expected.codes, wrong)
    assert bool(differs(expected, got, BOUND))
    assert relative_difference(expected, got) > 0.1


def test_the_same_number_in_other_codes_and_scales() -> None:
    """What is compared is what is read."""
    x = torch.tensor([[1.0, 2.0, 4.0, -8.0]])
    expected = Coded(x.to(torch.float8_e4m3fn), torch.ones(1))
    got = Coded((x * 2).to(torch.float8_e4m3fn), torch.full((1,), 0.5))
    assert torch.equal(dequantise(*expected), dequantise(*got))
    assert not bool(differs(expected, got, BOUND))


def test_nan_on_one_side_is_wrong() -> None:
    _, expected = rows()
    scales = expected.scales.clone()
    scales[0, 0, 0] = torch.nan
    assert bool(differs(expected, Coded(expected.codes, scales), BOUND))


def test_pieces_hold_rows_with_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = rows()
    whole = relative_difference(expected, Coded(expected.codes, expected.scales * 1.5))
    monkeypatch.setattr(compare, "_AT_ONCE", 20)
    got = Coded(expected.codes, expected.scales * 1.5)
    assert relative_difference(expected, got) == whole
    assert not bool(differs(expected, expected, BOUND))
