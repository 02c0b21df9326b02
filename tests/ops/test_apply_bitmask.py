from __future__ import annotations

import pytest
import torch

from reprise.ops import apply_bitmask

reference = apply_bitmask.implementations["reference"].function
OTHERS = [each for each in apply_bitmask.implementations if each != "reference"]


def arguments(randn, platform, rows, vocab):
    generator = torch.Generator().manual_seed(vocab)
    size = (len(rows), -(-vocab // 32))
    bits = torch.randint(-(2**31), 2**31, size, generator=generator, dtype=torch.int64).int()
    device = platform.device
    return randn(max(rows) + 2, vocab), torch.tensor(rows, device=device), bits.to(device)


def test_reference_is_the_definition(randn, platform) -> None:
    logits, rows, bits = arguments(randn, platform, [2, 0], 75)
    expected = logits.clone()
    for number, row in enumerate(rows.tolist()):
        for token in range(75):
            if not (int(bits[number, token // 32]) >> (token % 32)) & 1:
                expected[row, token] = -torch.inf
    reference(logits, rows, bits)
    assert torch.equal(logits, expected)
    reference(logits, rows[:0], bits[:0])
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("rows", "vocab"), [([0], 1), ([1], 32), ([3, 0, 4], 160), ([2, 1], 4097), ([5, 4, 3], 9001)]
)
def test_others(implementation, randn, platform, rows, vocab, name) -> None:
    function = implementation(apply_bitmask, name)
    found, *rest = arguments(randn, platform, rows, vocab)
    expected = found.clone()
    reference(expected, *rest)
    function(found, *rest)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_may_be_strided(implementation, randn, platform, name) -> None:
    function = implementation(apply_bitmask, name)
    wide, rows, bits = arguments(randn, platform, [2, 0], 160)
    expected = wide[:, :64].clone()
    reference(expected, rows, bits[:, 1:3])
    function(wide[:, :64], rows, bits[:, 1:3])
    assert torch.equal(wide[:, :64], expected)
