"""Drafts that count by chance, for measurements of speed alone."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from reprise.ops.step import NEXT
from reprise.platforms import Platform
from reprise.runner.drafts.contract import Drafter
from reprise.runner.rows import Rows
from reprise.shape import StepShape
from reprise.speculation import Speculation
from reprise.step import Step

logger = logging.getLogger(__name__)


class SyntheticDrafter(Drafter):
    """Has each draft count with a given chance, for measurements of speed alone.

    Steps compute what they would with drafts of such quality; the texts mean nothing.

    Args:
        speculation: How many tokens, and the chance.
        rows: The requests.
        platform: The device.
    """

    def __init__(self, speculation: Speculation, rows: Rows, platform: Platform) -> None:
        assert speculation.synthetic_acceptance is not None
        self._chance = speculation.synthetic_acceptance
        self._count = speculation.num_tokens
        self._rows = rows
        self._places = torch.arange(self._count, device=platform.device)
        logger.warning(
            "synthetic drafts: each of %d counts with a chance of %g; what is generated means "
            "nothing", self._count, self._chance,
        )  # fmt: skip

    def judge(self, step: Step, rows: Tensor, first_draw: Tensor, drawn: Tensor) -> None:
        count = min(self._count, step.drafts[0]) if step.num_decodes else 0
        if not count:
            return
        # Decodes come first, each with as many draws.
        rows, first = rows[: step.num_decodes], first_draw[: step.num_decodes].long()
        got = drawn[first[:, None] + self._places[:count]]
        counts = torch.rand(got.shape, dtype=torch.float32, device=got.device) < self._chance
        drafts = torch.where(counts, got, got + 1).T
        self._rows.numbers[NEXT + 1 : NEXT + 1 + count].index_copy_(1, rows, drafts)

    def propose(
        self,
        step: Step,
        rows: Tensor,
        emitted: Tensor,
        shape: StepShape,
        at_least: StepShape | None,
    ) -> None:
        """Which drafts count is decided when they are judged."""

    def memory(self) -> dict[str, Tensor]:
        return {}
