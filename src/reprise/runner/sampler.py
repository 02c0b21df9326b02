"""From logits to tokens: bias, penalties, the draw, and log probabilities."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.platforms import Platform
from reprise.request import Request
from reprise.runner.buffers import to_device

_PARAMETERS = (np.float32, np.int32, np.float32, np.float32, np.int64)
"""Types of temperature, top-k, top-p, min-p and seed, as ``ops.sample`` takes them."""


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
        self, logits: Tensor, requests: Sequence[Request], continues: bool = False
    ) -> tuple[Tensor, LogprobTensors | None]:
        """Draw.

        Args:
            logits: [R, V] in the compute dtype, one row a request.
            requests: The requests of the rows.
            continues: The last draw was for the same rows, one token earlier.

        Returns:
            [R] int64 token ids, and log probabilities if any request wants them.
        """
        batch = self._batch_of(requests)
        if batch.plain:  # the largest value is the same one in float32
            return ops.argmax(logits), None
        raw = logits.float()
        adjusted = self._adjust(raw, batch)
        if batch.greedy:
            tokens = ops.argmax(adjusted)
        else:
            if continues and batch.positions is not None:
                batch.positions += 1
            else:
                generated = np.array([_num_generated(each) for each in requests], dtype=np.int64)
                batch.positions = to_device(generated, self.platform)
            tokens = ops.sample(adjusted, *batch.parameters, batch.positions)
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
            ids = to_device(np.array(list(bias), dtype=np.int64), self.platform)
            values = to_device(np.array(list(bias.values()), dtype=np.float32), self.platform)
            logits[row].index_add_(0, ids, values)
        for row, request in batch.penalised:
            self._penalise(logits[row], request)
        for row, request in batch.held_open:
            if _num_generated(request) < request.params.min_tokens:
                stops = np.array(sorted(request.stop_token_ids), dtype=np.int64)
                logits[row].index_fill_(0, to_device(stops, self.platform), -torch.inf)
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


def example_draw(vocab_size: int, platform: Platform) -> Tensor:
    """A draw as of one request, [1]: it calls the op that all draws call which are not greedy."""
    logits = torch.zeros(1, vocab_size, device=platform.device)
    ones = [to_device(np.ones(1, dtype=kind), platform) for kind in (*_PARAMETERS, np.int64)]
    return ops.sample(logits, *ones)


class _PenaltyState:
    """Which tokens a request's prompt holds and how often each was generated: [V] both."""

    def __init__(self, request: Request, vocab_size: int, platform: Platform) -> None:
        prompt = np.zeros(vocab_size, dtype=np.bool_)
        prompt[request.prompt_token_ids] = True
        generated = np.array(request.output_token_ids, dtype=np.int64)
        counts = np.bincount(generated, minlength=vocab_size).astype(np.int32)
        self.in_prompt = to_device(prompt, platform)
        self.output_counts = to_device(counts, platform)


class _Batch:
    """What a set of requests asks of the sampler; built again only when the set changes."""

    def __init__(self, requests: Sequence[Request], platform: Platform) -> None:
        self.given = requests
        self._platform = platform
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
        self.positions: Tensor | None = None
        """[R] int64 on the device: how many tokens each request had before the last draw."""

    @functools.cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """Of the draw, an array each: temperature, top-k, top-p, min-p and seed."""
        parameters = [each.params for each in self.given]
        columns = (
            [0.0 if each.greedy else each.temperature for each in parameters],
            [max(each.top_k, 0) for each in parameters],
            [each.top_p for each in parameters],
            [each.min_p for each in parameters],
            [each.seed for each in self.given],
        )
        return tuple(
            to_device(np.array(values, dtype=kind), self._platform)
            for values, kind in zip(columns, _PARAMETERS, strict=True)
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
