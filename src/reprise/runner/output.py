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
        self._pinned = platform.pins_memory
        self._arrived: Any = platform.event()

    def take(self, tensors: LogprobTensors) -> LogprobTensors:
        """Start copying to new host memory; :meth:`send` comes after."""

        def copy(tensor: Tensor) -> Tensor:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
            return host.copy_(tensor, non_blocking=True)

        return LogprobTensors(copy(tensors.token_ids), copy(tensors.logprobs), copy(tensors.ranks))

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
        self._logprobs = None if logprobs is None else landing.take(logprobs)
        self._prompt_logprobs = {name: landing.take(each) for name, each in prompt_logprobs.items()}
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
            counts = [each.request.params.logprobs for each in scheduled if each.samples]
            entries = iter(to_logprobs(self._logprobs, counts))
            logprobs = [next(entries) if each.samples else None for each in scheduled]
        return StepOutput(sampled, logprobs, self._of_prompts())

    def _of_prompts(self) -> dict[str, list[Logprobs]]:
        found: dict[str, list[Logprobs]] = {}
        for name, tensors in self._prompt_logprobs.items():
            wanted = [tensors.token_ids.shape[1] - 1] * len(tensors.ranks)
            found[name] = [each for each in to_logprobs(tensors, wanted) if each is not None]
        return found


def to_logprobs(tensors: LogprobTensors, counts: Sequence[int | None]) -> list[Logprobs | None]:
    """For each row the chosen token and the ``counts`` likeliest ones by rank; None for None.

    The tensors are on the host and may list more, because a neighbour wanted them.
    """
    entries: list[Logprobs | None] = []
    columns: Sequence[Any] = (
        tensors.token_ids.tolist(),
        tensors.logprobs.tolist(),
        tensors.ranks.tolist(),
    )
    for ids, values, rank, count in zip(*columns, counts, strict=True):
        if count is None:
            entries.append(None)
            continue
        entry: Logprobs = {ids[0]: Logprob(values[0], rank)}
        likeliest = zip(ids[1 : count + 1], values[1 : count + 1], strict=True)
        for position, (token, value) in enumerate(likeliest, 1):
            entry.setdefault(token, Logprob(value, position))
        entries.append(entry)
    return entries
