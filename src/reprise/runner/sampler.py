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
from reprise.ops.step import NEXT
from reprise.platforms import Platform
from reprise.runner.arena import to_device
from reprise.runner.penalties import Penalties, SeenTokens, is_penalised
from reprise.runner.row_state import Draw
from reprise.runner.rows import Rows
from reprise.runner.token_limits import AllowedTokens, BadWords, ForbiddenTokens, RecentTokens
from reprise.sampling_params import WHOLE_VOCABULARY
from reprise.step import Admission, Masks, Step

logger = logging.getLogger(__name__)

CHECKED_ROWS = 8
"""Rows of a draw that are compared with the reference, whose memory and time are many times as
much."""
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
        rows: The requests.
        platform: The device.
    """

    def __init__(self, vocab_size: int, rows: Rows, platform: Platform) -> None:
        self.platform = platform
        self.rows = rows
        self._batch: _Batch | None = None
        self._kept = _Kept(
            SeenTokens(vocab_size, rows.count, platform),
            ForbiddenTokens(vocab_size, rows.count, platform),
            RecentTokens(vocab_size, rows.count, platform),
        )

    def __call__(
        self,
        logits: Tensor,
        step: Step,
        numbers: Tensor,
        masks: Masks | None = None,
        check: bool = False,
    ) -> tuple[Tensor, Tensor, LogprobTensors | None]:
        """Draw.

        Args:
            logits: [N, V] in the compute dtype: of each of the step's requests that samples, the
                row behind its last known token and one behind each draft.
            step: Whose logits they are.
            numbers: [N] int64, of the token drawn from each row, its number among those that its
                request generates.
            masks: Tokens that some rows may draw, applied behind all that requests ask for; log
                probabilities are those of the model. None: any may be drawn.
            check: Compare with the reference of the op that draws, which waits for the device.

        Returns:
            [N] int64 token ids; [N], the largest logit of each row, which tells the host whether
            anything could be drawn (NaN where a logit is); and log probabilities if any request
            wants them.
        """
        batch = self._batch_of(step)
        draw = _checked if check else _drawn
        if batch.plain and masks is None:  # the largest value is the same one in float32
            tokens = draw(ops.argmax, logits)
            return tokens, logits.gather(1, tokens.unsqueeze(1)).squeeze(1), None
        if batch.plain and masks is not None:
            _, which = batch.masked(masks.rows, len(logits))
            peaks = logits.new_empty(len(logits))
            words = to_device(masks.words, self.platform)
            return draw(ops.masked_argmax, logits, which, words, peaks), peaks, None
        peaks = logits.amax(dim=-1)
        raw = logits.float()
        adjusted = raw
        if batch.adjusts or masks is not None:
            # Log probabilities are of what the model gave, which is its memory where it is float32.
            spare = raw is not logits and batch.num_logprobs is None
            adjusted = batch.adjust(raw if spare else raw.clone(), numbers)
            if masks is not None:
                rows, _ = batch.masked(masks.rows, len(logits))
                ops.apply_bitmask(adjusted, rows, to_device(masks.words, self.platform))
        if batch.greedy:
            tokens = draw(ops.argmax, adjusted)
        else:
            tokens = draw(ops.sample, adjusted, *batch.parameters, numbers)
        wanted = batch.num_logprobs
        if wanted is None:
            return tokens, peaks, None
        return tokens, peaks, top_logprobs(raw, tokens, wanted, batch.whole_rows)

    def count(self, emitted: Tensor) -> None:
        """Note the new tokens of the requests of the step that was drawn from last, [R, 1 + K]
        int64, -1 for none."""
        if self._batch is not None:
            for each in (self._batch.penalties, self._batch.bad_words):
                if each is not None:
                    each.count(emitted)

    def admit(self, step: Step) -> None:
        """Rows have come free, or have new owners."""
        if step.released or step.admitted:
            self._batch = None
            for row in (*step.released, *(each.row for each in step.admitted)):
                for state in self._kept:
                    state.release(row)

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
        for state in self._kept:
            state.forget()

    def _batch_of(self, step: Step) -> _Batch:
        if self._batch is None or not self._batch.is_for(step):
            self._batch = _Batch(step, self._kept, self.rows)
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


def example_draws(vocab_size: int, num_drafts: int, dtype: torch.dtype, platform: Platform) -> None:
    """Draws as of one request that call every op which draws may call, beside plain argmax; logits
    have this dtype."""
    logits = torch.zeros(1, vocab_size, dtype=torch.float32, device=platform.device)
    ones = [to_device(np.ones(1, dtype=kind), platform) for kind in (*_PARAMETERS, np.int64)]
    ops.sample(logits, *ones)
    ops.argmax(logits)
    bits = torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32, device=platform.device)
    first = bits.new_zeros(1, dtype=torch.int64)
    ops.apply_bitmask(logits, first, bits)
    given = logits.to(dtype)
    ops.masked_argmax(given, first, bits, given.new_empty(1))
    seen = logits.int()
    row, *strengths = (
        to_device(np.zeros(1, dtype=kind), platform)
        for kind in (np.int64, np.float32, np.float32, np.float32)
    )
    for drafts in sorted({0, num_drafts}):
        ops.apply_penalties(logits, row, seen, row, *strengths, row.new_full((1, drafts), -1))


class _Kept(NamedTuple):
    """What stays on the device from draw to draw."""

    seen: SeenTokens
    forbidden: ForbiddenTokens
    recent: RecentTokens


class _Batch:
    """What a step's requests ask of the sampler; built again only when they are others."""

    def __init__(self, step: Step, kept: _Kept, rows: Rows) -> None:
        self._requests = list(step.rows), list(step.samples), list(step.drafts)
        self._rows = rows
        self._step_rows: Tensor | None = None
        self._masked_rows: np.ndarray[Any, Any] | None = None
        """[M] int64, rows of logits that had masks in the last step with any, and the same on the
        device, see :meth:`masked`."""
        self._masked: tuple[Tensor, Tensor]
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
        """All that requests ask for before the draw, in place on [N, V] float32."""
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

    def masked(self, rows: np.ndarray[Any, Any], num_rows: int) -> tuple[Tensor, Tensor]:
        """Rows of logits that have masks, and of all rows the masks' numbers, -1 for none; both
        int64. They are sent when they are others than in the last step.

        Args:
            rows: [M] int64, on the host.
            num_rows: All of them.
        """
        if self._masked_rows is None or not np.array_equal(self._masked_rows, rows):
            which = np.full(num_rows, -1, dtype=np.int64)
            which[rows] = np.arange(len(rows))
            self._masked_rows = rows
            self._masked = to_device(rows, self._platform), to_device(which, self._platform)
        return self._masked

    @functools.cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """Of the draw, an array each: temperature, top-k, top-p, min-p and seed."""
        rows = to_device(np.array(self._owners, dtype=np.int64), self._platform)
        found = self._rows.parameters(rows)
        return tuple(found[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed"))

    def is_for(self, step: Step) -> bool:
        rows, samples, drafts = self._requests
        return rows == step.rows and samples == step.samples and drafts == step.drafts
