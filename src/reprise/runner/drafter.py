"""Tokens that a step verifies beside the newest one of each request."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.ops.step import NEXT
from reprise.platforms import Platform
from reprise.runner.arena import to_device
from reprise.runner.rows import Rows
from reprise.speculation import Speculation
from reprise.step import Step

logger = logging.getLogger(__name__)


class Drafter(Protocol):
    """Fills what rows have behind their newest tokens. Works on the device alone."""

    def admit(self, step: Step) -> None:
        """Rows have new owners, whose known tokens the step says."""

    def judge(self, step: Step, rows: Tensor, first_draw: Tensor, drawn: Tensor) -> None:
        """Tokens were drawn; the rows have not moved on yet.

        Args:
            step: Whose they are.
            rows: [R] int64, the step's.
            first_draw: [R + 1] int32, where each request's draws begin.
            drawn: [D] int64.
        """

    def propose(self, rows: Tensor, emitted: Tensor) -> None:
        """The rows have moved on: draft.

        Args:
            rows: [R] int64.
            emitted: [R, 1 + K] int64, their new tokens, -1 behind them.
        """

    def memory(self) -> dict[str, Tensor]:
        """What lies on the device from step to step, by name."""


def make_drafter(
    speculation: Speculation, rows: Rows, max_model_len: int, platform: Platform
) -> Drafter:
    """What drafts as ``speculation`` says."""
    if speculation.synthetic_acceptance is not None:
        return SyntheticDrafter(speculation, rows, platform)
    return NgramDrafter(speculation, rows, max_model_len, platform)


class NgramDrafter:
    """Drafts what followed the same tokens earlier in a request's text (``ops.ngram``).

    Args:
        speculation: How many tokens are drafted and compared.
        rows: The requests.
        max_model_len: Longest text.
        platform: The device.
    """

    def __init__(
        self, speculation: Speculation, rows: Rows, max_model_len: int, platform: Platform
    ) -> None:
        self._speculation = speculation
        self._rows = rows
        self._platform = platform
        shape = (rows.count, max_model_len)
        self._tokens = torch.zeros(shape, dtype=torch.int32, device=platform.device)
        logger.info(
            "n-gram drafts: %d tokens behind the last %d to %d; %.1f MiB for the texts of %d "
            "requests",
            speculation.num_tokens, speculation.lookup_min, speculation.lookup_max,
            self._tokens.nbytes / 2**20, rows.count - 1,
        )  # fmt: skip

    def admit(self, step: Step) -> None:
        if not step.admitted:
            return
        texts = [np.array(each.token_ids, dtype=np.int32) for each in step.admitted]
        together = to_device(np.concatenate(texts), self._platform)
        begin = 0
        for each, text in zip(step.admitted, texts, strict=True):
            end = begin + len(text)
            self._tokens[each.row, : len(text)].copy_(together[begin:end])
            begin = end

    def judge(self, step: Step, rows: Tensor, first_draw: Tensor, drawn: Tensor) -> None:
        """A draft that is no token that was drawn does not count: nothing to do."""

    def propose(self, rows: Tensor, emitted: Tensor) -> None:
        asked = self._speculation
        ops.ngram(
            self._rows.numbers, self._tokens, rows, emitted,
            asked.lookup_max, asked.lookup_min, asked.num_tokens,
        )  # fmt: skip

    def memory(self) -> dict[str, Tensor]:
        return {"n-gram drafter's texts": self._tokens}


class SyntheticDrafter:
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

    def admit(self, step: Step) -> None:
        """Nothing of a request is needed."""

    def judge(self, step: Step, rows: Tensor, first_draw: Tensor, drawn: Tensor) -> None:
        if not step.num_decodes:
            return
        # Decodes come first, each with as many draws.
        rows, first = rows[: step.num_decodes], first_draw[: step.num_decodes].long()
        got = drawn[first[:, None] + self._places]
        counts = torch.rand(got.shape, device=got.device) < self._chance
        drafts = torch.where(counts, got, got + 1).T
        self._rows.numbers[NEXT + 1 : NEXT + 1 + self._count].index_copy_(1, rows, drafts)

    def propose(self, rows: Tensor, emitted: Tensor) -> None:
        """Which drafts count is decided when they are judged."""

    def memory(self) -> dict[str, Tensor]:
        return {}
