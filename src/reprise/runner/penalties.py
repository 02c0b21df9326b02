"""What requests have seen, kept on the device for their penalties."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.ops.apply_penalties import IN_PROMPT
from reprise.request import Request
from reprise.runner.buffers import to_device
from reprise.runner.request_slots import RequestSlots


class SeenTokens(RequestSlots):
    """The counts of ``ops.apply_penalties``, a slot for each request that has penalties."""

    @functools.cached_property
    def counts(self) -> Tensor:
        """[S, V] int32. Not before somebody asks for penalties: it is large."""
        size = (self.max_requests, self.vocab_size)
        return torch.zeros(size, dtype=torch.int32, device=self.platform.device)

    def fill(self, slot: int, request: Request) -> None:
        row = self.counts[slot].zero_()
        prompt = np.unique(np.array(request.prompt_token_ids, dtype=np.int64))
        row.index_fill_(0, to_device(prompt, self.platform), IN_PROMPT)
        if request.output_token_ids:
            output = np.array(request.output_token_ids, dtype=np.int64)
            tokens = to_device(output, self.platform)
            row.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))


class Penalties:
    """Those of some rows of a batch.

    Args:
        rows: The rows' numbers with their requests.
        seen: Has, or gets, a slot for each request.
    """

    def __init__(self, rows: Sequence[tuple[int, Request]], seen: SeenTokens) -> None:
        slots = np.array([seen.slot_of(request) for _, request in rows], dtype=np.int64)
        parameters = [request.params for _, request in rows]
        columns = (
            np.array([row for row, _ in rows], dtype=np.int64),
            slots,
            slots * seen.vocab_size,
            np.array([each.repetition_penalty for each in parameters], dtype=np.float32),
            np.array([each.presence_penalty for each in parameters], dtype=np.float32),
            np.array([each.frequency_penalty for each in parameters], dtype=np.float32),
        )
        self._rows, self._slots, self._starts, *self._strengths = (
            to_device(each, seen.platform) for each in columns
        )
        self._counts = seen.counts
        self._ones = torch.ones_like(self._rows, dtype=torch.int32)

    def apply(self, logits: Tensor) -> None:
        """Change the rows of ``logits`` [R, V] float32 in place."""
        ops.apply_penalties(logits, self._rows, self._counts, self._slots, *self._strengths)

    def count(self, tokens: Tensor) -> None:
        """Note what was drawn, [R] int64."""
        self._counts.view(-1).index_add_(0, self._starts + tokens[self._rows], self._ones)


def is_penalised(request: Request) -> bool:
    parameters = request.params
    return (
        parameters.repetition_penalty != 1
        or parameters.presence_penalty != 0
        or parameters.frequency_penalty != 0
    )
