from __future__ import annotations

import pytest
import torch

from reprise.ops import masked_argmax

NAN, INF = float("nan"), float("inf")
NAMES = list(masked_argmax.implementations)


def computed(function, logits, which, bits):
    """Tokens and peaks."""
    peaks = logits.new_empty(len(logits))
    return function(logits, which, bits, peaks), peaks


def masks(platform, *allowed, vocab):
    """Of each set of tokens a mask."""
    words = torch.zeros(len(allowed), -(-vocab // 32), dtype=torch.int64)
    for row, tokens in enumerate(allowed):
        for token in tokens:
            words[row, token // 32] |= 1 << token % 32
    return words.int().to(platform.device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocab", [1, 31, 97, 4096, 9001])
def test_the_largest_that_is_allowed(implementation, dtypes, randn, platform, vocab, name) -> None:
    function = implementation(masked_argmax, name)
    generator = torch.Generator().manual_seed(vocab)
    allowed = [
        torch.randint(vocab, (count,), generator=generator).tolist() for count in (1, 3, vocab)
    ]
    bits = masks(platform, *allowed, vocab=vocab)
    which = [2, -1, 0, 1, -1, 2]
    for dtype in dtypes:
        logits = randn(len(which), vocab, dtype=dtype)
        tokens, peaks = computed(
            function, logits, torch.tensor(which, device=platform.device), bits
        )
        assert (tokens.dtype, peaks.dtype) == (torch.int64, dtype)
        for row, mask in enumerate(which):
            values = logits[row].tolist()
            free = range(vocab) if mask < 0 else sorted(set(allowed[mask]))
            assert int(tokens[row]) == max(free, key=values.__getitem__)
            assert float(peaks[row]) == max(values)


@pytest.mark.parametrize("name", NAMES)
def test_no_numbers_infinities_and_ties(implementation, platform, name) -> None:
    """The peak says that a row has what is no number, wherever it is."""
    rows = [[1.0, 7.0, 1.0, NAN], [5.0, 6.0, -INF, -INF], [NAN, 1.0, NAN, 2.0],
            [-INF, 3.0, -INF, 5.0], [2.0, INF, 2.0, -3.0], [5.0] * 4,
            [-1.0, 9.0, -2.0, -3.0], [1.0, -NAN, 1.0, 0.0]]  # fmt: skip
    logits = torch.tensor(rows, device=platform.device)
    bits = masks(platform, {0, 2}, {2, 3}, vocab=4)
    which = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0], device=platform.device)
    tokens, peaks = computed(implementation(masked_argmax, name), logits, which, bits)
    assert tokens.tolist() == [0, 0, 0, 0, 0, 2, 0, 0]
    expected = torch.tensor([NAN, 6.0, NAN, 5.0, INF, 5.0, 9.0, NAN])
    assert torch.equal(peaks.cpu().isnan(), expected.isnan())
    assert torch.equal(peaks.cpu().nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_strided_rows(implementation, randn, platform, name) -> None:
    function = implementation(masked_argmax, name)
    wide, bits = randn(4, 6000), masks(platform, {3, 4999}, {70, 71}, vocab=6000)
    which = torch.tensor([1, -1, 0, 1], device=platform.device)
    straight = computed(function, wide[:, :5000].contiguous(), which, bits[:, :157].contiguous())
    for given in (wide[:, :5000], wide[:, :5000].t().contiguous().t()):
        for words in (bits[:, :157], bits[:, :157].t().contiguous().t()):
            found = computed(function, given, which, words)
            assert all(map(torch.equal, found, straight))
