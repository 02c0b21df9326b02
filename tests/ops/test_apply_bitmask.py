from __future__ import annotations

import pytest
import torch

from reprise.ops import apply_bitmask

reference = apply_bitmask.implementations["reference"].function
OTHERS = [each for each in apply_bitmask.implementations if each != "reference"]


def arguments(randn, platform, which, vocab):
    generator = torch.Generator().manual_seed(vocab)
    size = (1 + max(which), -(-vocab // 32))
    bits = torch.randint(-(2**31), 2**31, size, generator=generator, dtype=torch.int64).int()
    device = platform.device
    return randn(len(which), vocab), torch.tensor(which, device=device), bits.to(device)


def test_reference_is_the_definition(randn, dtypes, platform) -> None:
    for dtype in dtypes:
        logits, which, bits = arguments(randn, platform, [1, -1, 0, 1], 75)
        logits = logits.to(dtype)
        before, expected = logits.clone(), logits.to(torch.float32, copy=True)
        for row, mask in enumerate(which.tolist()):
            for token in range(75 if mask >= 0 else 0):
                if not (int(bits[mask, token // 32]) >> (token % 32)) & 1:
                    expected[row, token] = -torch.inf
        found = reference(logits, which, bits)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        free = reference(logits, which.fill_(-1), bits)
        assert torch.equal(free, logits.float())
        free.zero_()
        assert torch.equal(logits, before)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("which", "vocab"),
    [([0], 1), ([-1, 0], 32), ([3, 0, 3, -1], 160), ([2, 1], 4097), ([5, -1, 3], 9001)],
)
def test_others(implementation, randn, dtypes, platform, which, vocab, name) -> None:
    function = implementation(apply_bitmask, name)
    for dtype in dtypes:
        logits, *rest = arguments(randn, platform, which, vocab)
        logits = logits.to(dtype)
        logits[0, 0] = torch.nan
        before = logits.clone()
        found = function(logits, *rest)
        assert found.dtype == torch.float32
        assert torch.equal(found.nan_to_num(9.0), reference(logits, *rest).nan_to_num(9.0))
        found.zero_()
        assert torch.equal(logits.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize("name", OTHERS)
def test_rows_may_be_strided(implementation, randn, platform, name) -> None:
    function = implementation(apply_bitmask, name)
    wide, which, bits = arguments(randn, platform, [2, -1, 0], 160)
    expected = reference(wide[:, :64], which, bits[:, 1:3])
    for given in (wide[:, :64], wide[:, :64].t().contiguous().t()):
        for words in (bits[:, 1:3], bits[:, 1:3].t().contiguous().t()):
            assert torch.equal(function(given, which, words), expected)
