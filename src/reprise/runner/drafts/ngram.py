"""Drafts from the text itself: what followed the same tokens earlier."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.platforms import Platform
from reprise.runner.arena import to_device
from reprise.runner.drafts.contract import Drafter
from reprise.runner.rows import Rows
from reprise.shape import StepShape
from reprise.speculation import Speculation
from reprise.step import Step

logger = logging.getLogger(__name__)


class NgramDrafter(Drafter):
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

    def propose(
        self,
        step: Step,
        rows: Tensor,
        emitted: Tensor,
        shape: StepShape,
        at_least: StepShape | None,
    ) -> None:
        asked = self._speculation
        count = asked.num_tokens if step.drafting is None else step.drafting
        ops.ngram(
            self._rows.numbers, self._tokens, rows, emitted,
            asked.lookup_max, asked.lookup_min, count,
        )  # fmt: skip

    def memory(self) -> dict[str, Tensor]:
        return {"n-gram drafter's texts": self._tokens}
