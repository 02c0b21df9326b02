"""From logits to tokens: bias, penalties, the draw, and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.platforms import Platform
from reprise.request import Request


@dataclass
class LogprobTensors:
    """For each row: the chosen token first, then the most likely ones.

    ``token_ids`` [R, 1 + n] int64, ``logprobs`` [R, 1 + n] float32, ``ranks`` [R] int64 (of the
    chosen token, 1 is the likeliest).
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor


class Sampler:
    """Draws one token for each of a step's sampling rows.

    State that grows with a request (token counts for the penalties) stays on the device from
    draw to draw, so that a draw never waits for the host.
    """

    def __init__(self, vocab_size: int, platform: Platform) -> None:
        self.vocab_size = vocab_size
        self.platform = platform
        self._batch: _Batch | None = None
        self._penalties: dict[str, _PenaltyState] = {}

    def __call__(
        self, logits: Tensor, requests: Sequence[Request]
    ) -> tuple[Tensor, LogprobTensors | None]:
        """Draw.

        Args:
            logits: [R, V] in the compute dtype, one row a request.
            requests: The requests of the rows.

        Returns:
            [R] int64 token ids, and log probabilities if any request wants them.
        """
        batch = self._batch_of(requests)
        if batch.plain:  # the widest values are the same ones in any dtype
            return ops.argmax(logits), None
        raw = logits.float()
        adjusted = self._adjust(raw, batch)
        if batch.greedy:
            tokens = ops.argmax(adjusted)
        else:
            generated = [_num_generated(each) for each in requests]
            positions = torch.tensor(generated, dtype=torch.int64).to(self.platform.device)
            tokens = ops.sample(adjusted, *batch.parameters, positions)
        for row, request in batch.penalised:
            self._penalties[request.request_id].output_counts.scatter_add_(
                0, tokens[row : row + 1], _one(self.platform)
            )
        wanted = batch.num_logprobs
        return tokens, None if wanted is None else top_logprobs(raw, tokens, wanted)

    def release(self, request_ids: Sequence[str]) -> None:
        """Drop the state of requests that ended or were preempted."""
        for request_id in request_ids:
            self._penalties.pop(request_id, None)

    def forget(self) -> None:
        """Drop the state of all requests."""
        self._batch = None
        self._penalties.clear()

    def _batch_of(self, requests: Sequence[Request]) -> _Batch:
        if self._batch is None or not self._batch.is_for(requests):
            self._batch = _Batch(requests, self.platform)
        return self._batch

    def _adjust(self, raw: Tensor, batch: _Batch) -> Tensor:
        if not batch.adjusted:
            return raw
        logits = raw.clone()
        for row, request in batch.biased:
            bias = request.params.logit_bias or {}
            ids = torch.tensor(list(bias), dtype=torch.int64).to(self.platform.device)
            values = torch.tensor(list(bias.values()), dtype=torch.float32)
            logits[row].index_add_(0, ids, values.to(self.platform.device))
        for row, request in batch.penalised:
            self._penalise(logits[row], request)
        for row, request in batch.held_open:
            if _num_generated(request) < request.params.min_tokens:
                stops = sorted(request.stop_token_ids)
                logits[row, torch.tensor(stops, dtype=torch.int64)] = -torch.inf
        return logits

    def _penalise(self, logits: Tensor, request: Request) -> None:
        """In place on one row [V]: repetition (Keskar et al. 2019), presence and frequency."""
        state = self._penalties.get(request.request_id)
        if state is None:
            state = _PenaltyState(request, self.vocab_size, self.platform)
            self._penalties[request.request_id] = state
        parameters = request.params
        counts = state.output_counts
        produced = counts > 0
        if parameters.repetition_penalty != 1:
            factor = parameters.repetition_penalty
            repeated = torch.where(logits > 0, logits / factor, logits * factor)
            logits.copy_(torch.where(produced | state.in_prompt, repeated, logits))
        logits.sub_(counts * parameters.frequency_penalty)
        logits.sub_(produced * parameters.presence_penalty)


def top_logprobs(logits: Tensor, chosen: Tensor, count: int) -> LogprobTensors:
    """Log probabilities of ``chosen`` [R] and of the ``count`` likeliest tokens.

    Args:
        logits: [R, V] float32, as the model gave them.
        chosen: [R] int64.
        count: Likeliest tokens to list beside the chosen one.
    """
    logprobs = logits.log_softmax(dim=-1)
    of_chosen = logprobs.gather(1, chosen.unsqueeze(1))
    ranks = (logprobs > of_chosen).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(count, logits.shape[1]), dim=-1)
    return LogprobTensors(
        torch.cat((chosen.unsqueeze(1), ids), dim=1), torch.cat((of_chosen, values), dim=1), ranks
    )


class _PenaltyState:
    """Which tokens a request's prompt holds and how often each was generated: [V] both."""

    def __init__(self, request: Request, vocab_size: int, platform: Platform) -> None:
        prompt = torch.zeros(vocab_size, dtype=torch.bool)
        prompt[torch.tensor(request.prompt_token_ids, dtype=torch.int64)] = True
        generated = torch.tensor(request.output_token_ids, dtype=torch.int64)
        counts = torch.bincount(generated, minlength=vocab_size).to(torch.int32)
        self.in_prompt = prompt.to(platform.device)
        self.output_counts = counts.to(platform.device)


class _Batch:
    """What a set of requests asks of the sampler; built again only when the set changes."""

    def __init__(self, requests: Sequence[Request], platform: Platform) -> None:
        self.given = requests
        parameters = [each.params for each in requests]
        rows = list(enumerate(requests))
        self.greedy = all(each.greedy for each in parameters)
        self.biased = [(i, each) for i, each in rows if each.params.logit_bias]
        self.penalised = [(i, each) for i, each in rows if _is_penalised(each)]
        self.held_open = [
            (i, each) for i, each in rows if each.params.min_tokens > 0 and each.stop_token_ids
        ]
        self.adjusted = bool(self.biased or self.penalised or self.held_open)
        counts = [each.logprobs for each in parameters if each.logprobs is not None]
        self.num_logprobs = max(counts, default=None)
        self.plain = self.greedy and not self.adjusted and self.num_logprobs is None
        """Nothing is asked for but the likeliest token."""
        self.parameters = tuple(
            torch.from_numpy(np.array(values, dtype=kind)).to(platform.device)
            for values, kind in (
                ([0.0 if each.greedy else each.temperature for each in parameters], np.float32),
                ([max(each.top_k, 0) for each in parameters], np.int32),
                ([each.top_p for each in parameters], np.float32),
                ([each.min_p for each in parameters], np.float32),
                ([each.seed for each in requests], np.int64),
            )
        )

    def is_for(self, requests: Sequence[Request]) -> bool:
        return requests is self.given or requests == self.given


def _num_generated(request: Request) -> int:
    """Tokens before the one that is being drawn, which the scheduler counts as pending already."""
    return request.num_output_tokens + request.num_pending - 1


def _is_penalised(request: Request) -> bool:
    parameters = request.params
    return (
        parameters.repetition_penalty != 1
        or parameters.presence_penalty != 0
        or parameters.frequency_penalty != 0
    )


def _one(platform: Platform) -> Tensor:
    return torch.ones(1, dtype=torch.int32, device=platform.device)
