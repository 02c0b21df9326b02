"""A step's results, still on their way from the device or arrived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reprise.logprobs import Logprob, Logprobs, WholeLogprobs
from reprise.platforms import Platform
from reprise.runner.arena import Ints
from reprise.runner.logprobs import LogprobTensors
from reprise.runner.rows import Rows
from reprise.sampling_params import WHOLE_VOCABULARY
from reprise.step import Step


@dataclass
class StepOutput:
    """What a step produced, on the host."""

    sampled: Sequence[Sequence[int]]
    """The new tokens of each of the step's requests, in their order; none where it samples none."""
    drafted: Sequence[int] = ()
    """Tokens that were drafted behind each request's newest one; empty where nothing ever is."""
    proposed: Sequence[Sequence[int]] = ()
    """Tokens that were drafted behind these, for each request's next step, -1 for none; only of a
    step that was drawn with masks, since the next one's follow them."""
    logprobs: list[list[Logprobs] | None] | None = None
    """Of these tokens, where their requests want them; None: nowhere."""
    failed: Sequence[int] = ()
    """Numbers of the step's requests that got no token, since logits of theirs are NaN, or the
    largest is infinite."""
    spoilt: Sequence[int] = ()
    """Numbers of the step's copies of states that were no finite numbers."""
    prompt_logprobs: dict[int, tuple[int, list[Logprobs]]] = field(default_factory=dict)
    """By a request's number in the step: the position where the step began in its prompt, and
    entries for the prompt tokens behind the ones that the step computed."""


_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""Bits that are all set in a number that is NaN or infinite, and in no other."""


class Peaks(NamedTuple):
    """The largest value of each row of logits that was drawn from, on the host."""

    bits: Ints
    """[D], of floating-point numbers."""
    exponent: int
    """The bits of the exponent, which are all set where a number is not finite."""


class Landing:
    """Host memory where a step's tokens arrive, and the event that says that they have.

    Both take long to make, so a step uses one that is free again.

    Args:
        max_requests: Most requests in a step.
        width: Numbers that a step has for each.
        max_draws: Most rows of logits that a step draws from.
        platform: The device that they come from.
    """

    def __init__(self, max_requests: int, width: int, max_draws: int, platform: Platform) -> None:
        self._pinned = platform.pins_memory
        self._tokens = torch.zeros(max_requests, width, dtype=torch.int64, pin_memory=self._pinned)
        self._numbers = self._tokens.numpy()
        self._room = torch.zeros(max_draws, dtype=torch.float32, pin_memory=self._pinned)
        self._shape: tuple[int, int, torch.dtype | None] | None = None
        """Requests and draws of the step that was sent last, and the dtype of the largest values:
        mostly the next one's too, so that the parts of memory are cut once."""
        self._parts = self._tokens[:0], self._room[:0]
        self._arrivals = self._numbers[:0], Peaks(np.zeros(0, dtype=np.int32), 0)
        """The same as the host reads them."""
        self._arrived: Any = platform.event()
        self.free = True
        """Nothing is on its way, nor waits to be read."""

    def take(self, tensors: LogprobTensors) -> LogprobTensors:
        """Start copying to new host memory; :meth:`send` comes after."""
        return LogprobTensors(
            self.copy(tensors.token_ids),
            self.copy(tensors.logprobs),
            self.copy(tensors.ranks),
            None if tensors.whole is None else self.copy(tensors.whole),
        )

    def copy(self, tensor: Tensor) -> Tensor:
        """Start copying to new host memory; :meth:`send` comes after."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        return host.copy_(tensor, non_blocking=True)

    def send(self, emitted: Tensor, peaks: Tensor | None) -> None:
        """Start copying ``emitted`` [R, 1 + K + 1] int64, what ``ops.advance`` says, and ``peaks``
        [D] in a floating-point dtype of up to 32 bits, if there are any."""
        draws, dtype = (0, None) if peaks is None else (peaks.shape[0], peaks.dtype)
        shape = emitted.shape[0], draws, dtype
        if self._shape != shape:
            self._cut(*shape)
        tokens, room = self._parts
        if peaks is not None:
            room.copy_(peaks, non_blocking=True)
        tokens.copy_(emitted, non_blocking=True)
        self._arrived.record()

    def _cut(self, requests: int, draws: int, dtype: torch.dtype | None) -> None:
        """Find the parts of memory for a step."""
        kind, exponent = _EXPONENTS[dtype or torch.float32]
        room = self._room.view(dtype or torch.float32)[:draws]
        self._parts = self._tokens[:requests], room
        self._arrivals = self._numbers[:requests], Peaks(room.view(kind).numpy(), exponent)
        self._shape = requests, draws, dtype

    def send_also(self, tensor: Tensor) -> Tensor:
        """As :meth:`copy`, behind :meth:`send`; :meth:`wait` waits for it too."""
        host = self.copy(tensor)
        self._arrived.record()
        return host

    def wait(self) -> Ints:
        """What was sent, when all that was submitted before :meth:`send` is done."""
        self._arrived.synchronize()
        return self._arrivals[0]

    @property
    def peaks(self) -> Peaks:
        """What was sent with what :meth:`wait` has given."""
        return self._arrivals[1]


class PendingOutput:
    """A submitted step. :meth:`wait` blocks until its results are on the host.

    Args:
        step: What was computed.
        rows: The requests.
        emitted: [R, 1 + K + 1] int64 on the device: new tokens, -1 behind them, and how many were
            drafted.
        peaks: [D] on the device, the largest value of each row of logits that was drawn from; None:
            from none.
        logprobs: Of these rows, if any request wants them.
        prompt_logprobs: By a request's number in the step, where the step began in its prompt and
            log probabilities of its tokens, in parts that ``landing`` has taken.
        landing: Taken by this step until it has been waited for.
        sound: [C] bool on the device: whether what each of the step's copies of states has read
            was finite numbers; None: it has none.
    """

    def __init__(
        self,
        step: Step,
        rows: Rows,
        emitted: Tensor,
        peaks: Tensor | None,
        logprobs: LogprobTensors | None,
        prompt_logprobs: dict[int, tuple[int, list[LogprobTensors]]],
        landing: Landing,
        sound: Tensor | None = None,
    ) -> None:
        self._step = step
        self._sound = None if sound is None else landing.copy(sound)
        self._rows = rows
        self._logprobs = None if logprobs is None else landing.take(logprobs)
        self._wanted: list[int | None] = []
        """Log probabilities that each request wants."""
        if logprobs is not None:
            owners = [rows.admitted[row] for row in step.rows]
            self._wanted = [None if each is None else each.params.logprobs for each in owners]
        self._prompt_logprobs = prompt_logprobs
        self._landing = landing
        self._places: tuple[Ints, Ints] | None = None
        if rows.num_drafts:
            places = np.array(step.rows, dtype=np.int64)
            self._places = places, rows.lives(places)
        landing.send(emitted, peaks)
        self._proposed: Tensor | None = None

    def add_drafts(self, drafts: Tensor) -> None:
        """[K, R] int64 on the device: what was drafted for each request's next step."""
        self._proposed = self._landing.send_also(drafts)

    def wait(self) -> StepOutput:
        emitted = self._landing.wait().copy()
        odd = self._odd(self._landing.peaks)
        self._landing.free = True
        drafted: Sequence[int] = ()
        if emitted.shape[1] == 2:
            sampled = [[] if token < 0 else [token] for token in emitted[:, 0].tolist()]
        else:
            counts = (emitted[:, :-1] >= 0).sum(axis=1)
            sampled = [
                tokens[:count]
                for tokens, count in zip(emitted.tolist(), counts.tolist(), strict=True)
            ]
            drafted = emitted[:, -1].tolist()
            self._settle(counts)
        failed = self._failed(odd, sampled)
        for number in failed:
            sampled[number] = []
        prompts = {
            number: (
                start,
                [
                    _entry(row, len(row[0]) - 1 if part.whole is None else WHOLE_VOCABULARY, whole)
                    for part in parts
                    for whole in [_whole(part)]
                    for row in _rows(part)
                ],
            )
            for number, (start, parts) in self._prompt_logprobs.items()
        }
        spoilt: Sequence[int] = ()
        if self._sound is not None:
            spoilt = (~self._sound).nonzero().flatten().tolist()
        proposed = () if self._proposed is None else self._proposed.T.tolist()
        return StepOutput(
            sampled, drafted, proposed, self._of_samples(sampled), failed, spoilt, prompts
        )

    @staticmethod
    def _odd(peaks: Peaks) -> list[int]:
        """Rows of logits from which nothing can be drawn."""
        odd = (peaks.bits & peaks.exponent) == peaks.exponent
        return np.flatnonzero(odd).tolist() if odd.any() else []

    def _failed(self, odd: Sequence[int], sampled: Sequence[Sequence[int]]) -> list[int]:
        """Numbers of the requests that have a token of such a row. One behind a draft that does not
        count is no request's."""
        if not odd:
            return []
        step, failed, begin = self._step, [], 0
        for number, tokens in enumerate(sampled):
            if any(begin <= row < begin + len(tokens) for row in odd):
                failed.append(number)
            begin += 1 + step.drafts[number] if step.samples[number] else 0
        return failed

    def _settle(self, counts: Ints) -> None:
        """Tell the rows how many drafts counted."""
        if self._places is None:
            return
        drafts = np.array(self._step.drafts, dtype=np.int64)
        accepted = np.where(drafts > 0, counts - 1, 0)
        self._rows.settle(*self._places, accepted, drafts - accepted)

    def _of_samples(self, sampled: Sequence[Sequence[int]]) -> list[list[Logprobs] | None] | None:
        if self._logprobs is None:
            return None
        rows, whole = _rows(self._logprobs), _whole(self._logprobs)
        found: list[list[Logprobs] | None] = []
        step = self._step
        for samples, drafts, tokens, count in zip(
            step.samples, step.drafts, sampled, self._wanted, strict=True
        ):
            drawn = [next(rows) for _ in range(1 + drafts if samples else 0)]
            wholes = iter([next(whole) for _ in drawn] if count == WHOLE_VOCABULARY else ())
            entries = None
            if count is not None:
                entries = [_entry(row, count, wholes) for row in drawn[: len(tokens)]]
            found.append(entries)
        return found


_Row = tuple[list[int], list[float], int]
"""Token ids and log probabilities, the chosen token first, and the chosen one's rank."""


def _rows(tensors: LogprobTensors) -> Iterator[_Row]:
    """Of tensors on the host."""
    columns = (tensors.token_ids.tolist(), tensors.logprobs.tolist(), tensors.ranks.tolist())
    return zip(*columns, strict=True)


def _whole(tensors: LogprobTensors) -> Iterator[Any]:
    """[V] of each row that wants the whole vocabulary, in memory that callers may keep."""
    return iter(()) if tensors.whole is None else (row.copy() for row in tensors.whole.numpy())


def _entry(row: _Row, count: int, whole: Iterator[Any]) -> Logprobs:
    """The chosen token and the ``count`` likeliest by rank: a neighbour may have wanted more."""
    ids, values, rank = row
    if count == WHOLE_VOCABULARY:
        return WholeLogprobs(ids[0], next(whole))
    entry = {ids[0]: Logprob(values[0], rank)}
    likeliest = zip(ids[1 : count + 1], values[1 : count + 1], strict=True)
    for position, (token, value) in enumerate(likeliest, 1):
        entry.setdefault(token, Logprob(value, position))
    return entry
