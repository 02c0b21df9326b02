"""From logits to tokens: bias, penalties, the draw, and log probabilities."""

from __future__ import annotations

import inspect
import logging
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.addresses import address_of
from reprise.platforms import Platform
from reprise.runner.arena import to_device
from reprise.runner.logprobs import LogprobTensors, top_logprobs
from reprise.runner.mask_words import MaskWords
from reprise.runner.penalties import SeenTokens
from reprise.runner.rows import Rows
from reprise.runner.sampled_batch import Kept, SampledBatch
from reprise.runner.token_limits import ForbiddenTokens, RecentTokens
from reprise.step import Masks, Step

logger = logging.getLogger(__name__)

CHECKED_ROWS = 8
"""Rows of a draw that are compared with the reference, whose memory and time are many times as
much."""
_PARAMETERS = (np.float32, np.int32, np.float32, np.float32, np.int64)
"""Types of temperature, top-k, top-p, min-p and seed, as ``ops.sample`` takes them."""


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
        self._batch: SampledBatch | None = None
        self._words = MaskWords(vocab_size, platform)
        self._kept = Kept(
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
            which = batch.masked(masks)
            peaks = logits.new_empty(len(logits))
            words = self._words.of(masks)
            return draw(ops.masked_argmax, logits, which, words, peaks), peaks, None
        peaks = logits.amax(dim=-1)
        adjusted = logits
        if batch.adjusts:
            adjusted = batch.adjust(logits.to(torch.float32, copy=True), numbers)
        if masks is not None:
            which = batch.masked(masks)
            adjusted = ops.apply_bitmask(adjusted, which, self._words.of(masks))
        adjusted = adjusted.float()
        if batch.greedy:
            tokens = draw(ops.argmax, adjusted)
        else:
            tokens = draw(ops.sample, adjusted, *batch.parameters, numbers)
        wanted = batch.num_logprobs
        if wanted is None:
            return tokens, peaks, None
        changed = batch.adjusts or masks is not None
        raw = logits.float() if changed else adjusted
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
        holders: list[Any] = [*self._kept, self._words]
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
                        found.setdefault(address_of(each), (f"sampler's {label} {number}", each))
        return dict(found.values())

    def forget(self) -> None:
        """Drop the state of all requests."""
        self._batch = None
        for state in self._kept:
            state.forget()

    def _batch_of(self, step: Step) -> SampledBatch:
        if self._batch is None or not self._batch.is_for(step):
            self._batch = SampledBatch(step, self._kept, self.rows)
        return self._batch


def _drawn(op: ops.Op, *arguments: Tensor) -> Tensor:
    return cast(Tensor, op(*arguments))


def _checked(op: ops.Op, *arguments: Tensor) -> Tensor:
    """The op's tokens, after a look at what its reference draws from some of the rows.

    The likeliest token is the reference's if they differ; a sampled one may lie on the edge of a
    rounding.
    """
    tokens = _drawn(op, *arguments)
    reference = op.implementations["reference"].function
    named = zip(inspect.signature(reference).parameters, arguments, strict=True)
    some = [each[:CHECKED_ROWS] if name in op.rows else each for name, each in named]
    expected = reference(*some)
    drawn = tokens[:CHECKED_ROWS]
    if torch.equal(expected, drawn):
        return tokens
    logger.warning(
        "op %s draws tokens %s where its reference draws %s: choose another implementation with "
        "--op %s=reference if this is not rare",
        op.name, drawn.tolist(), expected.tolist(), op.name,
    )  # fmt: skip
    return tokens if op is ops.sample else torch.cat((expected, tokens[CHECKED_ROWS:]))


def example_draws(vocab_size: int, num_drafts: int, dtype: torch.dtype, platform: Platform) -> None:
    """Draws as of one request that call every op which draws may call, beside plain argmax; logits
    have this dtype."""
    logits = torch.zeros(1, vocab_size, dtype=torch.float32, device=platform.device)
    ones = [to_device(np.ones(1, dtype=kind), platform) for kind in (*_PARAMETERS, np.int64)]
    ops.sample(logits, *ones)
    ops.argmax(logits)
    bits = torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32, device=platform.device)
    first = bits.new_zeros(1, dtype=torch.int64)
    given = logits.to(dtype)
    for each in (logits, given):
        ops.apply_bitmask(each, first, bits)
    ops.masked_argmax(given, first, bits, given.new_empty(1))
    seen = logits.int()
    row, *strengths = (
        to_device(np.zeros(1, dtype=kind), platform)
        for kind in (np.int64, np.float32, np.float32, np.float32)
    )
    for drafts in sorted({0, num_drafts}):
        ops.apply_penalties(logits, row, seen, row, *strengths, row.new_full((1, drafts), -1))
