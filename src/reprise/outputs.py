"""What a caller gets back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from reprise.logprobs import Logprob, Logprobs, WholeLogprobs
from reprise.request import FinishReason

__all__ = [
    "CompletionOutput",
    "Logprob",
    "Logprobs",
    "RequestMetrics",
    "RequestOutput",
    "WholeLogprobs",
]


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's ``n`` completions."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    """One entry a token, if ``SamplingParams.logprobs`` was set."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-text token."""
    suspect_from: int | None = None
    """Tokens from this one on (counted from 0) may be wrong: a graph drew them unseen that a canary
    found wrong later. None: no graph that drew them has been found wrong."""

    def finished(self) -> bool:
        """Whether the completion has ended."""
        return self.finish_reason is not None

    def extend(self, later: CompletionOutput) -> None:
        """Add what is new since this one: a delta that came later."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        self.cumulative_logprob = later.cumulative_logprob
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.suspect_from = later.suspect_from

    def copy(self) -> Self:
        """A copy whose lists are its own."""
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return replace(self, token_ids=list(self.token_ids), logprobs=logprobs)


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of ``time.perf_counter``."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    num_preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A request's prompt and what has been generated for it so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[Logprobs | None] | None = None
    """One entry a prompt token (None for the first), if requested."""

    @property
    def suspect_from(self) -> int | None:
        """The first token of any completion that may be wrong, see :class:`CompletionOutput`."""
        found = [each.suspect_from for each in self.outputs if each.suspect_from is not None]
        return min(found, default=None)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose keys and values came from the prefix cache."""
        return self.metrics.num_cached_tokens

    def extend(self, later: RequestOutput) -> None:
        """Add what is new since this one: a delta that came later."""
        known = {each.index: each for each in self.outputs}
        for each in later.outputs:
            if each.index in known:
                known[each.index].extend(each)
            else:
                self.outputs.append(each)
        self.finished = later.finished
        self.metrics = later.metrics
        if self.prompt_logprobs is None:
            self.prompt_logprobs = later.prompt_logprobs

    def copy(self) -> Self:
        """A copy whose completions are its own."""
        return replace(self, outputs=[each.copy() for each in self.outputs])
