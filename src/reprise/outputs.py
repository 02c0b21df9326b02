"""What a caller gets back."""

from __future__ import annotations

from dataclasses import dataclass, field

from reprise.request import FinishReason


@dataclass(slots=True)
class Logprob:
    """Log probability of one token at one position, under the model's unmodified logits."""

    logprob: float
    rank: int | None = None
    """1 is the likeliest token."""
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]
"""Token id to its log probability; the chosen token comes first."""


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

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


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
