"""A step's results, still on their way from the device or arrived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reprise.logprobs import Logprob, Logprobs, WholeLogprobs
from reprise.platforms import Platform
from reprise.runner.sampler import LogprobTensors
from reprise.sampling_params import WHOLE_VOCABULARY
from reprise.step import ScheduledStep


@dataclass
class StepOutput:
    """What a step produced, on the host."""

    sampled: Sequence[int | None]
    """The new token of each of the step's requests, in their order; None where it samples none."""
    logprobs: list[Logprobs | None] | None = None
    """Of these tokens, where their requests want them; None: nowhere."""
    prompt_logprobs: dict[str, list[Logprobs]] = field(default_factory=dict)
    """By request id: entries for the prompt tokens behind the ones that this step computed."""


class Landing:
    """Host memory where a step's tokens arrive, and the event that says that they have.

    Both take long to make, so steps use a few of them in turn.

    Args:
        max_tokens: Most tokens that a step samples.
        platform: The device that they come from.
    """

    def __init__(self, max_tokens: int, platform: Platform) -> None:
        self._tokens = torch.zeros(max_tokens, dtype=torch.int64, pin_memory=platform.pins_memory)
        self._numbers = self._tokens.numpy()
        self._count = 0
        self._pinned = platform.pins_memory
        self._arrived: Any = platform.event()

    def take(self, tensors: LogprobTensors) -> LogprobTensors:
        """Start copying to new host memory; :meth:`send` comes after."""

        def copy(tensor: Tensor) -> Tensor:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
            return host.copy_(tensor, non_blocking=True)

        return LogprobTensors(
            copy(tensors.token_ids),
            copy(tensors.logprobs),
            copy(tensors.ranks),
            None if tensors.whole is None else copy(tensors.whole),
        )

    def send(self, tokens: Tensor | None) -> None:
        """Start copying ``tokens`` [S] int64, if there are any."""
        self._count = 0 if tokens is None else len(tokens)
        if tokens is not None:
            self._tokens[: self._count].copy_(tokens, non_blocking=True)
        self._arrived.record()

    def wait(self) -> list[int]:
        """The tokens, when all that was submitted before :meth:`send` is done."""
        self._arrived.synchronize()
        found: list[int] = self._numbers[: self._count].tolist()
        return found


class PendingOutput:
    """A submitted step. :meth:`wait` blocks until its results are on the host.

    Args:
        step: What was computed.
        tokens: [S] int64 on the device, one for each sampling request; None if there are none.
        logprobs: Of the same rows, if any request wants them.
        prompt_logprobs: Request id to log probabilities of its prompt's tokens, in parts that
            ``landing`` has taken.
        landing: No other step uses it before this one has been waited for.
    """

    def __init__(
        self,
        step: ScheduledStep,
        tokens: Tensor | None,
        logprobs: LogprobTensors | None,
        prompt_logprobs: dict[str, list[LogprobTensors]],
        landing: Landing,
    ) -> None:
        self._step = step
        self._logprobs = None if logprobs is None else landing.take(logprobs)
        self._prompt_logprobs = prompt_logprobs
        self._landing = landing
        landing.send(tokens)

    def wait(self) -> StepOutput:
        tokens = self._landing.wait()
        scheduled = self._step.requests
        sampled: Sequence[int | None] = tokens
        if len(tokens) < len(scheduled):
            found = iter(tokens)
            sampled = [next(found) if each.samples else None for each in scheduled]
        prompts = {
            name: [
                _entry(row, len(row[0]) - 1 if part.whole is None else WHOLE_VOCABULARY, whole)
                for part in parts
                for whole in [_whole(part)]
                for row in _rows(part)
            ]
            for name, parts in self._prompt_logprobs.items()
        }
        return StepOutput(sampled, self._of_samples(), prompts)

    def _of_samples(self) -> list[Logprobs | None] | None:
        if self._logprobs is None:
            return None
        rows, whole = _rows(self._logprobs), _whole(self._logprobs)
        found: list[Logprobs | None] = []
        for each in self._step.requests:
            row = next(rows) if each.samples else None
            count = each.request.params.logprobs
            found.append(None if row is None or count is None else _entry(row, count, whole))
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
