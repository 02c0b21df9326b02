"""A request in steps that verify drafts, chunks between, as ops that rewrite states are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SLOT = 2
WRONG = 1 << 20
"""Of drafts that do not count: whatever they are."""
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Plan:
    """One step of the request."""

    begin: int
    """Its tokens that are there before."""
    counts: int
    """New ones that turn out to count."""
    new: int
    """All new ones."""
    known: bool
    beyond: int = 0
    """Of the new ones, the last so many lie beyond the request's end."""


def plans(seed: int, num_drafts: int, tokens: int) -> list[Plan]:
    """Chunks and verifying steps in random order; a prompt first."""
    random, found, begin = np.random.default_rng(seed), [], 0
    while begin < tokens:
        left = tokens - begin
        if not found or random.random() < 0.25:
            # Also as many as a verifying step has.
            count = min(left, int(random.choice([1, 2, 1 + num_drafts, 5, 66])))
            found.append(Plan(begin, count, count, True))
        else:
            new = 1 + num_drafts if random.random() < 0.8 else 1
            count = min(left, int(random.integers(1, new + 1)))
            beyond = int(random.integers(0, new - count + 1))
            found.append(Plan(begin, count, new, False, beyond))
        begin += found[-1].counts
    return found


def run(
    call: Call, plan: list[Plan], num_drafts: int, device: torch.device, *, uniform: bool
) -> Tensor:
    """What the request gets for the tokens that count, [T, ...].

    Args:
        call: Makes the op's call: of the rows [N] int64 of the text that the step computes, -1
            where a draft is wrong, and the arguments that tell of the step; returns [N, ...].
        plan: The steps.
        num_drafts: K.
        device: Of the arguments.
        uniform: Say of verifying steps that all requests have equally many tokens.
    """
    found, accepted = [], 0
    for step in plan:
        rows = torch.arange(step.begin, step.begin + step.new, device=device)
        rows[step.counts :] = -1
        # The slot of nobody beside it, with as many tokens of padding where all have as many.
        together = uniform and not step.known
        padding = step.new if together else 2

        def ints(*values: int, dtype: Any = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        places = [7] * (step.new - step.beyond) + [0] * (step.beyond + padding)
        out = call(
            torch.cat((rows, rows.new_full((padding,), -1))),
            slots=ints(SLOT, 0),
            query_start_loc=ints(0, step.new, step.new),
            seq_lens=ints(step.begin + step.new, 0),
            fresh=ints(step.begin == 0, 1).bool(),
            query_len=step.new if together else 0,
            accepted=ints(accepted, 0),
            known=ints(step.new if step.known else 0, 0),
            places=ints(*places, dtype=torch.int64),
        )
        assert not out[step.new :].count_nonzero()
        found.append(out[: step.counts].clone())
        accepted = 0 if step.known else step.counts
    return torch.cat(found)
