from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from reprise.ops import apply_penalties
from reprise.ops.apply_penalties import IN_PROMPT

reference = apply_penalties.implementations["reference"].function


def arguments(randn, platform, rows, vocab, slots=None):
    """Penalties for some of the rows of logits, other slots than rows, tokens of all kinds."""
    generator = torch.Generator().manual_seed(len(rows) + vocab)
    slots = slots or [len(rows) - n for n in range(len(rows))]
    seen = torch.randint(-2, 4, (max(slots) + 1, vocab), generator=generator).clamp(min=0)
    seen += IN_PROMPT * torch.randint(2, seen.shape, generator=generator)
    numbers = torch.linspace(0.4, 1.9, len(rows))
    drafted = torch.randint(-1, min(vocab, 40), (len(rows), vocab % 3), generator=generator)
    tensors = (
        torch.tensor(rows),
        seen.int(),
        torch.tensor(slots),
        numbers,
        numbers.flip(0) - 1,
        numbers / 2 - 0.3,
        drafted,
    )
    return randn(max(rows) + 2, vocab) * 4, *(each.to(platform.device) for each in tensors)


def test_reference_is_the_formula(randn, platform) -> None:
    prompt, output, vocab = [3, 7, 7, 2], [5, 3, 5, 5, 9], 12
    seen = torch.zeros(2, vocab, dtype=torch.int32, device=platform.device)
    seen[1, prompt] = IN_PROMPT
    for token, count in Counter(output).items():
        seen[1, token] += count
    logits = randn(3, vocab)
    expected = logits.clone()
    known = torch.tensor([prompt + output], device=platform.device)
    expected[2:] = RepetitionPenaltyLogitsProcessor(1.3)(known, logits[2:].clone())
    for token, count in Counter(output).items():
        expected[2, token] -= 0.7 + 0.2 * count

    def one(value, dtype):
        return torch.tensor([value], dtype=dtype, device=platform.device)

    row, slot = one(2, torch.int64), one(1, torch.int64)
    strengths = [one(v, torch.float32) for v in (1.3, 0.7, 0.2)]
    untouched = logits.clone()
    reference(logits, row, seen, slot, *strengths, row.new_empty(1, 0))
    torch.testing.assert_close(logits, expected)
    # Tokens that are drafted count like those of the output.
    for token in output[2:]:
        seen[1, token] -= 1
    drafted = torch.tensor([[*output[2:], -1]], device=platform.device)
    before = seen.clone()
    reference(untouched, row, seen, slot, *strengths, drafted)
    torch.testing.assert_close(untouched, expected)
    assert torch.equal(seen, before)


@pytest.mark.parametrize(
    ("rows", "vocab"), [([0], 1), ([1], 37), ([3, 0, 4], 160), ([2, 1], 4097), ([5, 4, 3], 9001)]
)
def test_triton(implementation, randn, platform, rows, vocab) -> None:
    triton = implementation(apply_penalties, "triton")
    found, *rest = arguments(randn, platform, rows, vocab)
    expected, untouched = found.clone(), found.clone()
    reference(expected, *rest)
    triton(found, *rest)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    others = [row for row in range(len(found)) if row not in rows]
    assert torch.equal(found[others], untouched[others])
    assert not torch.equal(found[rows], untouched[rows])


def test_triton_reads_strided_rows(implementation, randn, platform) -> None:
    triton = implementation(apply_penalties, "triton")
    wide, rows, seen, *rest = arguments(randn, platform, [2, 0], 50)
    expected = wide[:, 5:45].clone()
    reference(expected, rows, seen[:, 5:45], *rest)
    triton(wide[:, 5:45], rows, seen[:, 5:45], *rest)
    torch.testing.assert_close(wide[:, 5:45], expected, rtol=1e-6, atol=1e-6)
