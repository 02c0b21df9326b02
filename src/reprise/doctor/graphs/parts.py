"""Whose graphs the doctor looks at: the target's, and those of a model that drafts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reprise.graphs.plan import Executor
from reprise.runner import ModelRunner
from reprise.runner.drafts import CHAIN, PREFILL, DraftChain, DraftPrefill, ModelDrafter
from reprise.runner.forward_pass import ForwardPass
from reprise.shape import PHASES, Phase


@dataclass(frozen=True)
class Part:
    """One owner of graphs."""

    owner: str
    """Nothing: the target."""
    computation: ForwardPass | DraftPrefill | DraftChain
    model: torch.nn.Module
    width: int
    """New tokens of a request in decode steps."""
    phases: tuple[Phase, ...] = PHASES
    """Phases of its steps."""
    compiled: bool = True
    """Its code may be compiled."""

    def of(self, executors: Sequence[Executor]) -> list[Executor]:
        """The executors that this part can have."""
        return [each for each in executors if self.compiled or each != "compiled"]


def parts_of(runner: ModelRunner) -> list[Part]:
    """The target, and what drafts for it with graphs of its own."""
    width = 1 + runner.num_drafts
    parts = [Part("", runner.forward_pass, runner.model, width)]
    drafter = runner.drafter
    if isinstance(drafter, ModelDrafter):
        phases: tuple[Phase, ...] = PHASES if drafter.draft.shifted else ("mixed",)
        chain, chained = drafter.chain, drafter.inputs.width
        parts += [
            Part(PREFILL, drafter.prefill, drafter.draft, width, phases),
            Part(CHAIN, chain, drafter.draft, chained, ("decode",), compiled=False),
        ]
    return parts
