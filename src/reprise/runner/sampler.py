"""From logits to tokens: bias, penalties, the draw, and log probabilities."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.platforms import Platform
from reprise.request import Request
from reprise.runner.buffers import to_device
from reprise.runner.penalties import Penalties, SeenTokens, is_penalised
from reprise.runner.token_limits import AllowedTokens, BadWords, ForbiddenTokens, RecentTokens
from reprise.sampling_params import WHOLE_VOCABULARY

logger = logging.getLogger(__name__)

CHECKED_ROWS = 8
"""Rows of a draw that are compared with the reference, whose memory and time are many times as
much."""
_INT32_MAX = np.iinfo(np.int32).max
_PARAMETERS = (np.float32, np.int32, np.float32, np.float32, np.int64)
"""Types of temperature, top-k, top-p, min-p and seed, as ``ops.sample`` takes them."""


@dataclass
class LogprobTensors:
    """For each row: the chosen token first, then the most likely ones.

    ``token_ids`` [R, 1 + n] int64, ``logprobs`` [R, 1 + n] float32, ``ranks`` [R] int64 (of the
    chosen token, 1 is the likeliest). ``whole`` [W, V] float32: all log probabilities of the rows
    that want the whole vocabulary, in their order.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    whole: Tensor | None = None


class Sampler:
    """Draws one token for each of a step's sampling rows, without waiting for the device.

    Args:
        vocab_size: Of the logits.
        max_requests: Most requests at a time.
        platform: The device.
    """

    def __init__(self, vocab_size: int, max_requests: int, platform: Platform) -> None:
        self.platform = platform
        self._batch: _Batch | None = None
        self._kept = _Kept(
            SeenTokens(vocab_size, max_requests, platform),
            ForbiddenTokens(vocab_size, max_requests, platform),
            RecentTokens(vocab_size, max_requests, platform),
        )

    def __call__(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        continues: bool = False,
        check: bool = False,
    ) -> tuple[Tensor, LogprobTensors | None]:
        """Draw.

        Args:
            logits: [R, V] in the compute dtype, one row a request.
            requests: The requests of the rows.
            continues: The last draw was for the same rows, one token earlier.
            check: Compare with the reference of the op that draws, which waits for the device.

        Returns:
            [R] int64 token ids, and log probabilities if any request wants them.
        """
        batch = self._batch_of(requests)
        draw = _checked if check else _drawn
        if batch.plain:  # the largest value is the same one in float32
            return draw(ops.argmax, logits), None
        raw = logits.float()
        adjusted = batch.adjust(raw.clone()) if batch.adjusts else raw
        if batch.greedy:
            tokens = draw(ops.argmax, adjusted)
        else:
            if continues and batch.positions is not None:
                batch.positions += 1
            else:
                generated = np.array([_num_generated(each) for each in requests], dtype=np.int64)
                batch.positions = to_device(generated, self.platform)
            tokens = draw(ops.sample, adjusted, *batch.parameters, batch.positions)
        for each in (batch.penalties, batch.bad_words):
            if each is not None:
                each.count(tokens)
        wanted = batch.num_logprobs
        if wanted is None:
            return tokens, None
        return tokens, top_logprobs(raw, tokens, wanted, batch.whole_rows)

    def release(self, request_ids: Sequence[str]) -> None:
        """Drop the state of requests that ended or were preempted."""
        for request_id in request_ids:
            for slots in self._kept:
                if slots.release(request_id):
                    self._batch = None  # it may name the slot

    def memory(self) -> dict[str, Tensor]:
        """What lies on the device from draw to draw, by name: every tensor that anything here holds
        on to."""
        holders: list[Any] = [*self._kept]
        if self._batch is not None:
            batch = self._batch
            holders += [batch, batch.penalties, batch.bad_words, batch.allowed]
        found: dict[int, tuple[str, Tensor]] = {}
        for holder in holders:
            for name, value in vars(holder).items() if holder is not None else ():
                tensors = value if isinstance(value, tuple | list) else (value,)
                for number, each in enumerate(tensors):
                    if isinstance(each, Tensor) and each.numel():
                        label = f"{type(holder).__name__.strip('_')}.{name.strip('_')}"
                        found.setdefault(each.data_ptr(), (f"sampler's {label} {number}", each))
        return dict(found.values())

    def forget(self) -> None:
        """Drop the state of all requests."""
        self._batch = None
        for slots in self._kept:
            slots.forget()

    def _batch_of(self, requests: Sequence[Request]) -> _Batch:
        if self._batch is None or not self._batch.is_for(requests):
            self._batch = _Batch(requests, self._kept)
        return self._batch


def _drawn(op: ops.Op, *arguments: Tensor) -> Tensor:
    return cast(Tensor, op(*arguments))


def _checked(op: ops.Op, *arguments: Tensor) -> Tensor:
    """The op's tokens, after a look at what its reference draws from some of the rows.

    The likeliest token is the reference's if they differ; a sampled one may lie on the edge of a
    rounding.
    """
    tokens = _drawn(op, *arguments)
    some = [each[:CHECKED_ROWS] for each in arguments]
    expected = op.implementations["reference"].function(*some)
    drawn = tokens[:CHECKED_ROWS]
    if torch.equal(expected, drawn):
        return tokens
    logger.warning(
        "op %s draws tokens %s where its reference draws %s: choose another implementation with "
        "--op %s=reference if this is not rare",
        op.name, drawn.tolist(), expected.tolist(), op.name,
    )  # fmt: skip
    return tokens if op is ops.sample else torch.cat((expected, tokens[CHECKED_ROWS:]))


def top_logprobs(
    logits: Tensor, chosen: Tensor, count: int, whole: Tensor | None = None
) -> LogprobTensors:
    """Log probabilities of ``chosen`` [R] and of the ``count`` likeliest tokens.

    Args:
        logits: [R, V] float32, as the model gave them.
        chosen: [R] int64.
        count: Likeliest tokens to list beside the chosen one.
        whole: [W] int64, rows whose whole vocabulary is wanted.
    """
    logprobs = logits.log_softmax(dim=-1)
    of_chosen = logprobs.gather(1, chosen.unsqueeze(1))
    ranks = (logprobs > of_chosen).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(count, logits.shape[1]), dim=-1)
    return LogprobTensors(
        torch.cat((chosen.unsqueeze(1), ids), dim=1),
        torch.cat((of_chosen, values), dim=1),
        ranks,
        None if whole is None else logprobs.index_select(0, whole),
    )


def example_draws(vocab_size: int, platform: Platform) -> None:
    """Draws as of one request that call every op which draws may call, beside plain argmax."""
    logits = torch.zeros(1, vocab_size, device=platform.device)
    ones = [to_device(np.ones(1, dtype=kind), platform) for kind in (*_PARAMETERS, np.int64)]
    ops.sample(logits, *ones)
    ops.argmax(logits)
    seen = logits.int()
    row, *strengths = (
        to_device(np.zeros(1, dtype=kind), platform)
        for kind in (np.int64, np.float32, np.float32, np.float32)
    )
    ops.apply_penalties(logits, row, seen, row, *strengths)


class _Kept(NamedTuple):
    """What stays on the device from draw to draw."""

    seen: SeenTokens
    forbidden: ForbiddenTokens
    recent: RecentTokens


class _Batch:
    """What a set of requests asks of the sampler; built again only when the set changes."""

    def __init__(self, requests: Sequence[Request], kept: _Kept) -> None:
        self.given = requests
        self._platform = kept.seen.platform
        self._vocab_size = kept.seen.vocab_size
        parameters = [each.params for each in requests]
        rows = list(enumerate(requests))
        self.greedy = all(each.greedy for each in parameters)
        self.penalties: Penalties | None = None
        penalised = [(row, each) for row, each in rows if is_penalised(each)]
        if penalised:
            self.penalties = Penalties(penalised, kept.seen)
        self.bad_words: BadWords | None = None
        worded = [(row, each) for row, each in rows if each.bad_words]
        if worded:
            self.bad_words = BadWords(worded, kept.recent)
        self.allowed: AllowedTokens | None = None
        limited = [(row, each) for row, each in rows if each.params.allowed_token_ids is not None]
        if limited:
            self.allowed = AllowedTokens(limited, len(rows), kept.forbidden)
        self._bias = self._biases(rows)
        self._held_open = [
            (row, each) for row, each in rows if each.params.min_tokens > 0 and each.stop_token_ids
        ]
        self._closed: Tensor | None = None
        """Flat indices of the tokens that may not end requests yet."""
        self.adjusts = bool(penalised or worded or limited or self._bias or self._held_open)
        counts = [each.logprobs for each in parameters if each.logprobs is not None]
        self.num_logprobs = max((max(each, 0) for each in counts), default=None)
        self.whole_rows: Tensor | None = None
        """[W] int64: rows whose log probabilities are wanted of the whole vocabulary."""
        whole = [row for row, each in rows if each.params.logprobs == WHOLE_VOCABULARY]
        if whole:
            self.whole_rows = to_device(np.array(whole, dtype=np.int64), self._platform)
        self.plain = self.greedy and not self.adjusts and self.num_logprobs is None
        """Nothing is asked for but the likeliest token."""
        self.positions: Tensor | None = None
        """[R] int64 on the device: how many tokens each request had before the last draw."""

    def adjust(self, logits: Tensor) -> Tensor:
        """All that requests ask for before the draw, in place on [R, V] float32."""
        flat = logits.view(-1)
        if self._bias is not None:
            flat.index_add_(0, *self._bias)
        if self.penalties is not None:
            self.penalties.apply(logits)
        if self.bad_words is not None:
            self.bad_words.apply(logits)
        if self.allowed is not None:
            self.allowed.apply(logits)
        if self._held_open:
            self._hold_open()
        if self._closed is not None:
            flat.index_fill_(0, self._closed, -torch.inf)
        return logits

    def _biases(self, rows: Sequence[tuple[int, Request]]) -> tuple[Tensor, Tensor] | None:
        """Flat indices of biased logits, and the biases."""
        biases = {
            row * self._vocab_size + token: bias
            for row, request in rows
            for token, bias in (request.params.logit_bias or {}).items()
        }
        if not biases:
            return None
        places = np.array(list(biases), dtype=np.int64)
        values = np.array(list(biases.values()), dtype=np.float32)
        return to_device(places, self._platform), to_device(values, self._platform)

    def _hold_open(self) -> None:
        """Renew the tokens that may not end requests yet, when one has become long enough."""
        held = [
            (row, each)
            for row, each in self._held_open
            if _num_generated(each) < each.params.min_tokens
        ]
        if self._closed is not None and len(held) == len(self._held_open):
            return
        self._held_open = held
        places = [
            row * self._vocab_size + token for row, each in held for token in each.stop_token_ids
        ]
        self._closed = None
        if places:
            self._closed = to_device(np.array(places, dtype=np.int64), self._platform)

    @functools.cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """Of the draw, an array each: temperature, top-k, top-p, min-p and seed."""
        parameters = [each.params for each in self.given]
        columns = (
            [0.0 if each.greedy else each.temperature for each in parameters],
            [min(max(each.top_k, 0), _INT32_MAX) for each in parameters],
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
