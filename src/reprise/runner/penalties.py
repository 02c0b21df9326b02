"""What requests have seen, kept on the device for their penalties."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.ops.apply_penalties import IN_PROMPT
from reprise.runner.arena import to_device
from reprise.runner.row_state import Draw, RowState
from reprise.sampling_params import SamplingParams
from reprise.step import Admission


class SeenTokens(RowState):
    """The counts of ``ops.apply_penalties`` of each request that has penalties."""

    @functools.cached_property
    def counts(self) -> Tensor:
        """[S, V] int32. Not before a request asks for penalties: it is large."""
        size = (self.num_rows, self.vocab_size)
        return torch.zeros(size, dtype=torch.int32, device=self.platform.device)

    def fill(self, row: int, admission: Admission) -> None:
        counts = self.counts[row].zero_()
        known, length = np.array(admission.token_ids, dtype=np.int64), admission.num_prompt_tokens
        counts.index_fill_(0, to_device(np.unique(known[:length]), self.platform), IN_PROMPT)
        if len(known) > length:
            tokens = to_device(known[length:], self.platform)
            counts.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))


class Penalties:
    """The penalties of some rows of a step's logits.

    Args:
        draws: The rows.
        num_drafts: K, most drafts of a request.
        seen: Has, or gets, the counts of each request.
    """

    def __init__(self, draws: Sequence[Draw], num_drafts: int, seen: SeenTokens) -> None:
        slots = np.array([seen.ensure(each.request) for each in draws], dtype=np.int64)
        parameters = [each.request.params for each in draws]
        ahead = np.array([each.ahead for each in draws], dtype=np.int64)
        columns = (
            np.array([each.row for each in draws], dtype=np.int64),
            slots,
            np.array([each.number for each in draws], dtype=np.int64),
            # A request's tokens are counted once, however many draws it has.
            np.where(ahead == 0, slots * seen.vocab_size, -1),
            np.arange(num_drafts) < ahead[:, None],
            np.array([each.repetition_penalty for each in parameters], dtype=np.float32),
            np.array([each.presence_penalty for each in parameters], dtype=np.float32),
            np.array([each.frequency_penalty for each in parameters], dtype=np.float32),
        )
        self._rows, self._slots, self._numbers, starts, self._before, *self._strengths = (
            to_device(each, seen.platform) for each in columns
        )
        first = to_device(np.flatnonzero(ahead == 0), seen.platform)
        self._counted, self._starts = self._numbers[first], starts[first]
        self._counts = seen.counts

    def apply(self, logits: Tensor, drafts: Tensor) -> None:
        """Change the rows of ``logits`` [N, V] float32 in place.

        Args:
            logits: All rows of the step that are drawn from.
            drafts: [R, K] int64, of each of the step's requests, -1 for none.
        """
        if drafts.shape[1]:
            drafted = drafts.index_select(0, self._numbers).masked_fill_(~self._before, -1)
        else:
            drafted = drafts.new_empty((len(self._numbers), 0))
        ops.apply_penalties(
            logits, self._rows, self._counts, self._slots, *self._strengths, drafted
        )

    def count(self, emitted: Tensor) -> None:
        """Note the new tokens of the step's requests, [R, 1 + K] int64, -1 for none."""
        tokens = emitted.index_select(0, self._counted)
        places = self._starts[:, None] + tokens.clamp(min=0)
        self._counts.view(-1).index_add_(0, places.view(-1), (tokens >= 0).int().view(-1))


def is_penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )
