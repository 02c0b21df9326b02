"""What is asked before a draw, and by which parameters it is made."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reprise.ops.step import NEXT
from reprise.runner.arena import to_device
from reprise.runner.penalties import Penalties, SeenTokens, is_penalised
from reprise.runner.row_state import Draw
from reprise.runner.rows import Rows
from reprise.runner.token_limits import AllowedTokens, BadWords, ForbiddenTokens, RecentTokens
from reprise.sampling_params import WHOLE_VOCABULARY
from reprise.step import Admission, Masks, Step


class Kept(NamedTuple):
    """What stays on the device from draw to draw."""

    seen: SeenTokens
    forbidden: ForbiddenTokens
    recent: RecentTokens


class SampledBatch:
    """What a step's requests ask of the sampler; built again only when they are others."""

    def __init__(self, step: Step, kept: Kept, rows: Rows) -> None:
        self._requests = list(step.rows), list(step.samples), list(step.drafts)
        self._rows = rows
        self._step_rows: Tensor | None = None
        self._masked: tuple[bytes, Tensor] | None = None
        """[N] int64, of the last step that had any masks, here and on the device, see
        :meth:`masked`."""
        self._platform = kept.seen.platform
        self._vocab_size = kept.seen.vocab_size
        owners = [rows.admitted[row] for row in step.rows]
        drawing = [
            (owner, number, ahead)
            for number, owner in enumerate(owners)
            if step.samples[number] and owner is not None
            for ahead in range(1 + step.drafts[number])
        ]
        draws = [Draw(row, *each) for row, each in enumerate(drawing)]
        self._owners = [each.request.row for each in draws]
        parameters = [each.request.params for each in draws]
        self.greedy = all(each.greedy for each in parameters)
        self.penalties: Penalties | None = None
        penalised = [each for each in draws if is_penalised(each.request.params)]
        if penalised:
            self.penalties = Penalties(penalised, rows.num_drafts, kept.seen)
        self.bad_words: BadWords | None = None
        worded = [each for each in draws if each.request.bad_words]
        if worded:
            self.bad_words = BadWords(worded, rows.num_drafts, kept.recent)
        self.allowed: AllowedTokens | None = None
        limited = [each for each in draws if each.request.params.allowed_token_ids is not None]
        if limited:
            self.allowed = AllowedTokens(limited, len(draws), kept.forbidden)
        self._bias = self._biases(draws)
        self._held_open = [
            each
            for each in draws
            if each.request.params.min_tokens > 0
            and each.request.stop_token_ids
            # Its masks hold it open, unless its grammar leaves nothing else.
            and each.request.params.structured_outputs is None
        ]
        self._closed: tuple[Tensor, ...] = ()
        """Of the tokens that may not end requests yet: their flat indices, the rows of logits that
        they are in, and how many tokens come before they may."""
        self.adjusts = bool(penalised or worded or limited or self._bias or self._held_open)
        counts = [each.logprobs for each in parameters if each.logprobs is not None]
        self.num_logprobs = max((max(each, 0) for each in counts), default=None)
        self.whole_rows: Tensor | None = None
        """[W] int64: rows whose log probabilities are wanted of the whole vocabulary."""
        whole = [each.row for each in draws if each.request.params.logprobs == WHOLE_VOCABULARY]
        if whole:
            self.whole_rows = to_device(np.array(whole, dtype=np.int64), self._platform)
        self.plain = self.greedy and not self.adjusts and self.num_logprobs is None
        """Nothing is asked for but the likeliest token."""

    def adjust(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Apply all that requests ask for before the draw, in place on [N, V] float32."""
        flat = logits.view(-1)
        if self._bias is not None:
            flat.index_add_(0, *self._bias)
        if self.penalties is not None or self.bad_words is not None:
            drafts = self._drafts()
            if self.penalties is not None:
                self.penalties.apply(logits, drafts)
            if self.bad_words is not None:
                self.bad_words.apply(logits, drafts)
        if self.allowed is not None:
            self.allowed.apply(logits)
        if self._held_open:
            self._hold_open()
        if self._closed:
            places, of_rows, least = self._closed
            short = numbers.index_select(0, of_rows) < least
            flat.index_add_(0, places, torch.where(short, -torch.inf, 0.0))
        return logits

    def _drafts(self) -> Tensor:
        """[R, K] int64, of each of the step's requests, -1 for none."""
        if self._step_rows is None:
            rows = np.array(self._requests[0], dtype=np.int64)
            self._step_rows = to_device(rows, self._platform)
        return self._rows.numbers[NEXT + 1 :].index_select(1, self._step_rows).T

    def _biases(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor] | None:
        """Flat indices of biased logits, and the biases."""
        biases = {
            row * self._vocab_size + token: bias
            for row, request, *_ in draws
            for token, bias in (request.params.logit_bias or {}).items()
        }
        if not biases:
            return None
        places = np.array(list(biases), dtype=np.int64)
        values = np.array(list(biases.values()), dtype=np.float32)
        return to_device(places, self._platform), to_device(values, self._platform)

    def _hold_open(self) -> None:
        """Renew the tokens that may not end requests yet, when one has become long enough."""
        held = [each for each in self._held_open if self._may_be_short(each.request)]
        if self._closed and len(held) == len(self._held_open):
            return
        self._held_open = held
        closed = [
            (each.row * self._vocab_size + token, each.row, each.request.params.min_tokens)
            for each in held
            for token in each.request.stop_token_ids
        ]
        self._closed = tuple(
            to_device(np.array(column, dtype=np.int64), self._platform)
            for column in zip(*closed, strict=True)
        )

    def _may_be_short(self, request: Admission) -> bool:
        """Whether a token that is drawn now may come before the request's ``min_tokens``."""
        generated = int(self._rows.at_least[request.row]) - request.num_prompt_tokens
        return generated < request.params.min_tokens

    def masked(self, masks: Masks) -> Tensor:
        """[N] int64, the place of each row's mask, -1 for none, until the next call. They are sent
        when they are others than in the last step."""
        told = masks.which.tobytes()
        if self._masked is None or self._masked[0] != told:
            there = None
            if self._masked is not None and len(self._masked[0]) == len(told):
                there = self._masked[1]
            self._masked = told, to_device(masks.which, self._platform, there)
        return self._masked[1]

    @functools.cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """Of the draw, an array each: temperature, top-k, top-p, min-p and seed."""
        rows = to_device(np.array(self._owners, dtype=np.int64), self._platform)
        found = self._rows.parameters(rows)
        return tuple(found[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed"))

    def is_for(self, step: Step) -> bool:
        rows, samples, drafts = self._requests
        return rows == step.rows and samples == step.samples and drafts == step.drafts
