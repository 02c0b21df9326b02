from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reprise.ops import sample
from reprise.ops.sample.reference import uniform
from reprise.runner.token_limits import BAD

reference = sample.implementations["reference"].function
ROUNDING = 3e-6
"""Relative error of a mass in float32; where the draw lies closer to a boundary, either side of
it is right."""

Row = dict[str, Any]


def arguments(logits: Tensor, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The op's arguments; what a row does not say is greedy-free and unfiltered."""
    defaults = {
        "temperature": (1.0, torch.float32),
        "top_k": (0, torch.int32),
        "top_p": (1.0, torch.float32),
        "min_p": (0.0, torch.float32),
        "seeds": (0, torch.int64),
        "positions": (0, torch.int64),
    }
    return {"logits": logits} | {
        name: torch.tensor([row.get(name, default) for row in rows], dtype=dtype).to(logits.device)
        for name, (default, dtype) in defaults.items()
    }


# ---- an independent oracle -------------------------------------------------------------------


def philox(seed: int, position: int) -> int:
    """First word of Philox-4x32-10 in unbounded integers."""
    counter = [position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF, 0, 0]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32)]
    return counter[0]


def kept_weights(logits: np.ndarray, row: Row, shift: float = 0.0) -> np.ndarray:
    """Float64 weights of one row's tokens, 0 where filtered; ``shift`` moves the top-p mass."""
    scaled = (logits / np.float32(row.get("temperature", 1.0))).astype(np.float64)
    weights = np.exp(scaled - scaled.max())
    kept = np.ones(len(scaled), dtype=bool)
    top_k = row.get("top_k", 0)
    if 0 < top_k < len(scaled):
        kept &= scaled >= np.sort(scaled)[-top_k]
    top_p = float(np.float32(row.get("top_p", 1.0)))
    if top_p < 1:
        values, place = np.unique(-scaled, return_inverse=True)
        mass = np.bincount(place, weights=np.where(kept, weights, 0.0))
        before = (mass.cumsum() - mass) / mass.sum()
        last = np.flatnonzero((before == 0) | (before < top_p + shift))[-1]
        kept &= scaled >= -values[last]
    if row.get("min_p", 0.0) > 0:
        kept &= weights >= float(np.float32(row["min_p"])) * (1 + shift)
    return np.where(kept, weights, 0.0)


def right_tokens(logits: np.ndarray, row: Row) -> set[int]:
    """The token to draw, and those that rounding could turn it into."""
    if row.get("temperature", 1.0) == 0:
        return {int(np.flatnonzero(logits == logits.max())[0])}
    fraction = (philox(row.get("seeds", 0), row.get("positions", 0)) >> 8) / (1 << 24)
    found = set()
    for shift in (-ROUNDING, 0.0, ROUNDING):
        cumulative = kept_weights(logits, row, shift).cumsum()
        for moved in (fraction - ROUNDING, fraction, fraction + ROUNDING):
            target = min(max(moved, 0.0), 1 - 1e-9) * cumulative[-1]
            found.add(int(np.searchsorted(cumulative, target, side="right")))
    return found


def assert_draws_right(function: Callable[..., Tensor], logits: Tensor, rows: list[Row]) -> None:
    drawn = function(**arguments(logits, rows))
    assert drawn.dtype == torch.int64
    ambiguous = 0
    for row, each, token in zip(rows, logits.cpu().numpy(), drawn.tolist(), strict=True):
        right = right_tokens(each, row)
        ambiguous += len(right) > 1
        assert token in right, f"{row}: drew {token}, right: {sorted(right)}"
    assert ambiguous <= max(1, len(rows) // 10), "the oracle decides too little"


# ---- rows that exercise every path -----------------------------------------------------------


def rows_of_all_kinds() -> list[Row]:
    return [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_k": 50},
        {"top_k": 10**9},
        {"top_p": 0.9},
        {"top_p": 0.3, "temperature": 0.6},
        {"top_p": 1e-6},
        {"top_p": 0.999999, "temperature": 0.5},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.2},
        {"top_k": 3, "top_p": 0.5},
        {"temperature": 1e-3},
        {"temperature": 50.0, "top_k": 7, "top_p": 0.7},
    ]


def with_draws(rows: list[Row]) -> list[Row]:
    return [row | {"seeds": 17 * i - 3, "positions": i} for i, row in enumerate(rows)]


IMPLEMENTATIONS = list(sample.implementations)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [7, 1000])
def test_draws_the_right_token(implementation, randn, vocab, name) -> None:
    rows = with_draws(rows_of_all_kinds())
    assert_draws_right(implementation(sample, name), 3 * randn(len(rows), vocab), rows)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_vocabularies(implementation, platform, randn, name) -> None:
    rows = with_draws(rows_of_all_kinds())
    vocab = 151936
    if platform.device_type == "cpu" and name == "triton":
        rows, vocab = [rows[i] for i in (0, 1, 6, 12)], 20000
    assert_draws_right(implementation(sample, name), 3 * randn(len(rows), vocab), rows)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_vocabulary_of_one(implementation, randn, name) -> None:
    rows = with_draws([{"temperature": 0.0}, {}, {"top_k": 1, "top_p": 0.5, "min_p": 1.0}])
    assert implementation(sample, name)(**arguments(randn(3, 1), rows)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_flat_distributions(implementation, randn, name) -> None:
    """More tokens may be kept than the kernel collects; in the last row they are all equal."""
    rows = with_draws(
        [{"top_p": 0.9}, {"top_k": 17000, "top_p": 0.98, "min_p": 0.5}, {"top_p": 0.6}]
    )
    logits = 0.1 * randn(len(rows), 20000)
    logits[2] = 1.5
    assert_draws_right(implementation(sample, name), logits, rows)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_ties_are_kept_or_dropped_together(implementation, randn, name) -> None:
    rows = with_draws([{"top_k": 3}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.7}, {"min_p": 0.2}])
    logits = (2 * randn(len(rows), 300)).round()
    logits[:, ::7] = -0.0  # equal to 0.0
    assert_draws_right(implementation(sample, name), logits, rows)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_greedy_takes_the_lowest_of_equals(implementation, platform, name) -> None:
    logits = torch.zeros(4, 700)
    logits[0, [699, 300, 301]] = 2.0
    logits[1] = -torch.inf
    logits[1, 650] = -1e30
    logits[3, 5:] = 1e-30
    drawn = implementation(sample, name)(
        **arguments(logits.to(platform.device), [{"temperature": 0.0}] * 4)
    )
    assert drawn.tolist() == [300, 650, 0, 5]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_masked_tokens_are_never_drawn(implementation, platform, name) -> None:
    allowed = [3, 131, 140, 400]
    logits = torch.full((8, 500), -torch.inf)
    logits[:, allowed] = torch.tensor([0.0, -1.0, 1.0, -80.0])
    kinds: list[Row] = [{}, {"top_k": 3}, {"top_k": 100}, {"top_p": 0.999}]
    rows = with_draws([kinds[i % 4] for i in range(8)])
    drawn = implementation(sample, name)(**arguments(logits.to(platform.device), rows)).tolist()
    assert set(drawn) <= set(allowed[:3])
    assert len(set(drawn)) > 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bad_tokens_are_drawn_where_no_other_is_allowed(implementation, platform, name) -> None:
    """What the sampler makes of bad words: see BAD in runner/token_limits.py."""
    kinds: list[Row] = [{}, {"top_k": 1, "top_p": 0.9}, {"top_p": 0.5}, {"min_p": 0.5}]
    half = [{"temperature": each, **kind} for each in (1.0, 2e-5) for kind in kinds]
    rows = with_draws(half * 2)
    logits = torch.full((16, 300), BAD)
    logits[:8, [3, 200]] = torch.tensor([1.0, 2.0])  # good ones
    logits[8:] = -torch.inf  # not allowed
    logits[8:, [7, 9]] = BAD
    drawn = implementation(sample, name)(**arguments(logits.to(platform.device), rows)).tolist()
    assert set(drawn[:8]) <= {3, 200}
    assert set(drawn[8:]) <= {7, 9}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [300, 2500, pytest.param(20000, marks=pytest.mark.long)])
def test_logits_that_are_no_numbers_give_tokens_of_the_vocabulary(
    implementation, platform, name, vocab
) -> None:
    """A draw from memory that is not the row's would end the next step of all requests."""
    kinds: list[Row] = [
        {"temperature": 0.0}, {}, {"top_k": 5}, {"top_k": 290}, {"top_p": 0.9}, {"min_p": 0.1},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.1},
    ]  # fmt: skip
    nan, inf = torch.nan, torch.inf
    for spoilt in ([nan], [inf], [-inf], [nan, 0.0], [inf, nan]):
        logits = torch.tensor(spoilt).repeat(len(kinds), vocab)[:, :vocab].contiguous()
        drawn = implementation(sample, name)(
            **arguments(logits.to(platform.device), with_draws(kinds))
        )
        assert int(drawn.min()) >= 0
        assert int(drawn.max()) < vocab


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_neighbours(implementation, randn, name) -> None:
    function = implementation(sample, name)
    rows = with_draws([{"top_p": 0.8}, {"temperature": 0.0}, {}, {"top_k": 9}])
    logits = randn(len(rows), 257)
    together = function(**arguments(logits, rows)).tolist()
    alone = [function(**arguments(logits[i : i + 1], rows[i : i + 1])).item() for i in range(4)]
    assert together == alone


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_reads_strided_rows(implementation, randn, name) -> None:
    function = implementation(sample, name)
    rows = with_draws([{}, {"top_k": 5}, {"temperature": 0.0}])
    wide = randn(3, 900)
    view = wide[:, 13:700]
    assert torch.equal(
        function(**arguments(view, rows)), function(**arguments(view.contiguous(), rows))
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_frequencies_are_the_probabilities(implementation, platform, name) -> None:
    """Pearson's chi-square; its 99.9th percentile for 4 degrees of freedom is 18.5."""
    draws = 4000
    if name == "triton" and platform.device_type == "cpu":
        pytest.skip("takes minutes in the interpreter; the draws are compared one by one above")
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0, 1.5])
    row = {"temperature": 1.3, "top_k": 5}
    rows = [row | {"seeds": 1000 + i, "positions": 4} for i in range(draws)]
    function = implementation(sample, name)
    drawn = function(**arguments(logits.expand(draws, -1).contiguous().to(platform.device), rows))
    counts = np.bincount(drawn.cpu().numpy(), minlength=7)
    weights = kept_weights(logits.numpy(), row)
    expected = draws * weights / weights.sum()
    kept = weights > 0
    assert kept.sum() == 5
    assert counts[~kept].sum() == 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 18.5


# ---- the uniform variate ---------------------------------------------------------------------


def test_uniform_matches_the_published_vector() -> None:
    """Random123's known answer for the all-zero counter and key begins with 6627e8d5."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert uniform(zero, zero).item() == (0x6627E8D5 >> 8) / (1 << 24)


words = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=20))
def test_uniform_is_philox(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    expected = [(philox(seed, position) >> 8) / (1 << 24) for seed, position in pairs]
    assert uniform(seeds, positions).tolist() == expected


@settings(max_examples=6)
@given(words, words)
def test_triton_uses_the_same_variate(platform, seed: int, position: int) -> None:
    if sample.implementations["triton"].requires(platform):
        pytest.skip("no Triton")
    # With equal logits the token is the variate in units of 1 / 512.
    row = {"seeds": seed, "positions": position}
    drawn = sample.implementations["triton"].function(
        **arguments(torch.zeros(1, 512, device=platform.device), [row])
    )
    assert drawn.item() == philox(seed, position) >> 23


@settings(max_examples=60)
@given(
    logits=st.lists(st.integers(-6, 6).map(lambda n: n / 2), min_size=1, max_size=9),
    top_k=st.integers(0, 10),
    top_p=st.sampled_from([0.1, 0.35, 0.6, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 0.3]),
    seed=st.integers(0, 99),
)
def test_reference_on_small_vocabularies(logits, top_k, top_p, min_p, seed) -> None:
    row = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seeds": seed}
    values = np.array(logits, dtype=np.float32)
    drawn = reference(**arguments(torch.from_numpy(values)[None], [row])).item()
    assert drawn in right_tokens(values, row)
