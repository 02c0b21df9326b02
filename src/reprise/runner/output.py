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

    sampled: list[list[int]]
    """New tokens of each of the step's requests, in their order; empty if it sampled none."""
    logprobs: list[list[Logprobs]] | None = None
    """For each of the step's requests, an entry a new token."""
    prompt_logprobs: dict[str, list[Logprobs]] = field(default_factory=dict)
    """By request id: entries for the prompt tokens behind the ones that this step computed."""


class PendingOutput:
    """A submitted step. :meth:`wait` blocks until its results are on the host.

    Args:
        step: What was computed.
        tokens: [S] int64 on the device, one for each sampling request; None if there are none.
        logprobs: Of the same rows, if any request wants them.
        prompt_logprobs: Request id to log probabilities of its prompt's tokens.
        platform: The device.
    """

    def __init__(
        self,
        step: ScheduledStep,
        tokens: Tensor | None,
        logprobs: LogprobTensors | None,
        prompt_logprobs: dict[str, LogprobTensors],
        platform: Platform,
    ) -> None:
        self._step = step
        self._tokens = None if tokens is None else _to_host(tokens, platform)
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        self._done: Any = platform.event()
        self._done.record(platform.current_stream())

    def wait(self) -> StepOutput:
        self._done.synchronize()
        requests = self._step.requests
        tokens = [] if self._tokens is None else self._tokens.tolist()
        if len(tokens) == len(requests):
            rows: Sequence[int] = range(len(requests))
            sampled = [[token] for token in tokens]
        else:
            rows = [row for row, each in enumerate(requests) if each.samples]
            sampled = [[] for _ in requests]
            for row, token in zip(rows, tokens, strict=True):
                sampled[row] = [token]
        logprobs: list[list[Logprobs]] | None = None
        if self._logprobs is not None:
            entries = to_logprobs(self._logprobs)
            logprobs = [[] for _ in requests]
            for row, entry in zip(rows, entries, strict=True):
                wanted = requests[row].request.params.logprobs
                if wanted is not None:
                    logprobs[row] = [_shorten(entry, wanted)]
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


def _shorten(entry: Logprobs, count: int) -> Logprobs:
    """Keep the chosen token and the ``count`` likeliest; neighbours may have wanted more."""
    chosen = next(iter(entry))
    return {
        token: value
        for token, value in entry.items()
        if token == chosen or (value.rank is not None and value.rank <= count)
    }


def _to_host(tensor: Tensor, platform: Platform) -> Tensor:
    if platform.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=platform.pins_memory)
    return host.copy_(tensor, non_blocking=True)
