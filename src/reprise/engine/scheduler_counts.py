"""What a scheduler has counted, and what callers get to see of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from reprise.request import FinishReason


@dataclass(frozen=True)
class SchedulerStats:
    """Numbers of one moment; those called total count from the start."""

    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks: int
    """All that requests can own."""
    cache_usage: float
    """0 to 1."""
    lifetime_blocks_used: dict[str, int]
    """By how long the cache needs a row: ``kept``, ``window of N``, ``state``."""
    lifetime_blocks: dict[str, int]
    """All that requests can own of each; two lifetimes may share them."""
    total_steps: int
    total_decode_tokens: int
    """Scheduled as a request's one last token."""
    total_prefill_tokens: int
    """All other scheduled tokens, recomputed ones included."""
    total_prompt_tokens: int
    """Of the prompts of requests that began to run; each counts once."""
    total_generated_tokens: int
    total_preemptions: int
    total_prefix_queries: int
    """Tokens looked up in the prefix cache by requests that ran for the first time."""
    total_prefix_hits: int
    total_finished: dict[FinishReason, int]


@dataclass(slots=True)
class SchedulerCounts:
    """Counts from the start, as :class:`SchedulerStats` explains them."""

    steps: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0}
    )
