from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.ops import checksum

IMPLEMENTATIONS = list(checksum.implementations)
MASK = 2**64 - 1


def by_definition(words: list[int]) -> int:
    """The formula of the reference's docstring, in whole numbers."""
    total = 0
    for place, word in enumerate(words):
        x = place
        x ^= x >> 16
        x = x * 0x85EBCA6B & 0xFFFFFFFF
        x ^= x >> 13
        x = x * 0xC2B2AE35 & 0xFFFFFFFF
        x ^= x >> 16
        total += word * (2 * x + 1)
    total &= MASK
    return total - (1 << 64) if total >> 63 else total


def random_words(platform, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
    return words.to(platform.device, torch.int32)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 5), (1, 9, 700), (3, 17, 64), (1, 1, 70_001), (2, 0, 4), (1, 3, 0)]
)
def test_the_sum_is_that_of_the_formula(implementation, platform, shape, name) -> None:
    words = random_words(platform, *shape)
    found = implementation(checksum, name)(words, None)
    assert found.tolist() == [[by_definition(unit) for unit in each] for each in words.tolist()]
    if shape[1] > 2:
        units = torch.tensor([shape[1] - 1, 0, 1, 0], device=platform.device)
        chosen = implementation(checksum, name)(words, units)
        assert torch.equal(chosen, found[:, units])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_regions_and_units_may_be_strided(implementation, platform, name) -> None:
    wide = random_words(platform, 3, 6, 2, 40)
    words = wide[:, ::2, 0]
    function = implementation(checksum, name)
    assert torch.equal(function(words, None), function(words.contiguous(), None))


@pytest.mark.parametrize("name", [each for each in IMPLEMENTATIONS if each != "triton"])
def test_in_pieces_it_is_the_same_sum(implementation, platform, monkeypatch, name) -> None:
    function = implementation(checksum, name)
    words = random_words(platform, 3, 17, 64)
    units = torch.tensor([16, 0, 1, 0, 7], device=platform.device)
    whole, chosen = function(words, None), function(words, units)
    for at_once in (50, 64, 450, 3 * 64 * 4):
        monkeypatch.setitem(function.__globals__, "AT_ONCE", at_once)
        assert torch.equal(function(words, None), whole)
        assert torch.equal(function(words, units), chosen)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_moved_content_shows(implementation, platform, name) -> None:
    """Two rows inside a block exchanged, whose plain sums are equal."""
    function = implementation(checksum, name)
    block = random_words(platform, 1, 1, 16, 32)
    block[0, 0, 5] = block[0, 0, 3].flip(0)
    before = function(block.view(1, 1, -1), None)
    block[0, 0, [3, 5]] = block[0, 0, [5, 3]].clone()
    assert not torch.equal(function(block.view(1, 1, -1), None), before)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**20),
    place=st.integers(0, 499),
    bit=st.integers(0, 31),
)
def test_any_bit_shows(platform, seed, place, bit) -> None:
    words = random_words(platform, 1, 1, 500, seed=seed)
    before = checksum(words, None)
    words[0, 0, place] ^= torch.tensor(1 << bit, device=platform.device).to(torch.int32)
    assert not torch.equal(checksum(words, None), before)
