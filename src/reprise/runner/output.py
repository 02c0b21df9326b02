"""A step's results, still on their way from the device or arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reprise.outputs import Logprob, Logprobs
from reprise.platforms import Platform
from reprise.runner.sampler import LogprobTensors
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
        self._arrived: Any = platform.event()

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
        prompt_logprobs: Request id to log probabilities of its prompt's tokens.
        landing: No other step uses it before this one has been waited for.
    """

    def __init__(
        self,
        step: ScheduledStep,
        tokens: Tensor | None,
        logprobs: LogprobTensors | None,
        prompt_logprobs: dict[str, LogprobTensors],
        landing: Landing,
    ) -> None:
        self._step = step
        self._logprobs = logprobs
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
        logprobs: list[Logprobs | None] | None = None
        if self._logprobs is not None:
            entries = iter(to_logprobs(self._logprobs))
            logprobs = [
                _shorten(next(entries), each.request.params.logprobs) if each.samples else None
                for each in scheduled
            ]
        return StepOutput(
            sampled,
            logprobs,
            {name: to_logprobs(tensors) for name, tensors in self._prompt_logprobs.items()},
        )


def to_logprobs(tensors: LogprobTensors) -> list[Logprobs]:
    """One dictionary a row: the chosen token, then the likeliest ones by rank."""
    entries: list[Logprobs] = []
    columns: Sequence[Any] = (
        tensors.token_ids.tolist(),
        tensors.logprobs.tolist(),
        tensors.ranks.tolist(),
    )
    for ids, values, rank in zip(*columns, strict=True):
        entry: Logprobs = {ids[0]: Logprob(values[0], rank)}
        for position, (token, value) in enumerate(zip(ids[1:], values[1:], strict=True), 1):
            entry.setdefault(token, Logprob(value, position))
        entries.append(entry)
    return entries


def _shorten(entry: Logprobs, count: int | None) -> Logprobs | None:
    """Keep the chosen token and the ``count`` likeliest; neighbours may have wanted more."""
    if count is None:
        return None
    chosen = next(iter(entry))
    return {
        token: value
        for token, value in entry.items()
        if token == chosen or (value.rank is not None and value.rank <= count)
    }
