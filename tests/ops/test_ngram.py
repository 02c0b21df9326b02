"""Drafts of n-grams against a loop over all places of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from reprise.ops import ngram
from reprise.ops.step import COMPUTED, NEXT
from reprise.platforms import Platform

LENGTH = 24


def drafts_of(text: list[int], most: int, least: int, count: int) -> list[int]:
    """The tokens behind the earliest place that ends in as many of the text's last ones as can
    be."""
    for size in range(min(most, len(text) - 1), least - 1, -1):
        for end in range(size, len(text)):
            if text[end - size : end] == text[-size:]:
                return text[end : end + count]
    return []


@pytest.mark.parametrize("name", list(ngram.implementations))
@settings(max_examples=40)
@given(data=st.data())
def test_drafts(
    implementation: Callable[..., Any], platform: Platform, name: str, data: st.DataObject
) -> None:
    function = implementation(ngram, name)
    most = data.draw(st.integers(1, 4))
    least = data.draw(st.integers(1, most))
    drafts, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    texts = data.draw(
        st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=LENGTH), min_size=1, max_size=3)
    )
    numbers = torch.full((NEXT + 1 + 3, 5), -9, dtype=torch.int64)
    tokens = torch.full((5, LENGTH), 7, dtype=torch.int32)
    emitted, rows = [], data.draw(st.permutations([1, 2, 3]))[: len(texts)]
    for row, text in zip(rows, texts, strict=True):
        new = data.draw(st.integers(0, width))
        known = text[: len(text) - new]
        tokens[row, : len(known)] = torch.tensor(known, dtype=torch.int32)
        numbers[COMPUTED, row] = len(text) - 1
        emitted.append(text[len(known) :] + [-1] * (width - new))
    device = platform.device
    on_device = numbers.to(device), tokens.to(device)
    function(
        *on_device, torch.tensor(rows, device=device), torch.tensor(emitted, device=device),
        most, least, drafts,
    )  # fmt: skip
    for row, text, new in zip(rows, texts, emitted, strict=True):
        found = on_device[0][NEXT + 1 : NEXT + 1 + drafts, row].tolist()
        expected = drafts_of(text, most, least, drafts) if new[0] >= 0 else []
        assert found == expected + [-1] * (drafts - len(expected))
        assert on_device[1][row, : len(text)].tolist() == text
        assert on_device[1][row, len(text) :].tolist() == [7] * (LENGTH - len(text))
        numbers[NEXT + 1 : NEXT + 1 + drafts, row] = -9
        on_device[0][NEXT + 1 : NEXT + 1 + drafts, row] = -9
    assert torch.equal(on_device[0].cpu(), numbers), "nothing else has changed"
