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


def test_reference_is_the_definition(randn, platform) -> None:
    logits, which, bits = arguments(randn, platform, [1, -1, 0, 1], 75)
    expected = logits.clone()
    for row, mask in enumerate(which.tolist()):
        for token in range(75 if mask >= 0 else 0):
            if not (int(bits[mask, token // 32]) >> (token % 32)) & 1:
                expected[row, token] = -torch.inf
    reference(logits, which, bits)
    assert torch.equal(logits, expected)
    reference(logits, which.fill_(-1), bits)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("which", "vocab"),
    [([0], 1), ([-1, 0], 32), ([3, 0, 3, -1], 160), ([2, 1], 4097), ([5, -1, 3], 9001)],
)
def test_others(implementation, randn, platform, which, vocab, name) -> None:
    function = implementation(apply_bitmask, name)
    found, *rest = arguments(randn, platform, which, vocab)
    expected = found.clone()
    reference(expected, *rest)
    function(found, *rest)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_may_be_strided(implementation, randn, platform, name) -> None:
    function = implementation(apply_bitmask, name)
    wide, which, bits = arguments(randn, platform, [2, -1, 0], 160)
    expected = wide[:, :64].clone()
    reference(expected, which, bits[:, 1:3])
    function(wide[:, :64], which, bits[:, 1:3])
    assert torch.equal(wide[:, :64], expected)
