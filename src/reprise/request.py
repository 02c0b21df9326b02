"""One sequence on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from reprise.sampling_params import SamplingParams

if TYPE_CHECKING:  # requests need no torch
    from reprise.cache.request_table import Checkpoint

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestStatus(Enum):
    WAITING = "waiting"
    """Never scheduled."""
    RUNNING = "running"
    """Owns cache blocks; takes part in steps."""
    PREEMPTED = "preempted"
    """Waits again; gave its blocks back and will recompute them."""
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_FAILED = "error"
    """No token could be drawn."""


FINISHED_STATUS: dict[FinishReason, RequestStatus] = {
    "stop": RequestStatus.FINISHED_STOPPED,
    "length": RequestStatus.FINISHED_LENGTH,
    "abort": RequestStatus.FINISHED_ABORTED,
    "error": RequestStatus.FINISHED_FAILED,
}


@dataclass(slots=True, eq=False)
class Request:
    """What the engine knows of one sequence. Times are ``time.perf_counter()`` seconds.

    The engine creates it; from ``Scheduler.add`` on only the scheduler (and, for the fields that
    say so, the cache manager) changes it.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower is more urgent."""
    eos_token_ids: frozenset[int] = frozenset()
    """The model's end-of-sequence tokens; emptied if the request ignores them."""
    skip_prefix_cache: bool = False
    """Compute every token, even if the cache has it; so with prompt logprobs, or if asked for."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token ids of ``params.bad_words``: each one's last is not drawn behind the others."""
    cache_salt: bytes = b""
    """Requests share cached blocks only with requests of the same salt."""
    seed: int = 0
    """Of the draws, 64 bits; already specific to this one of a caller's ``n`` completions."""
    arrival_time: float = field(default_factory=time.perf_counter)

    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)
    """The stop token id or stop string; None for an end-of-sequence token."""

    token_ids: list[int] = field(init=False, repr=False)
    """Prompt and output so far; only ever appended to."""
    output_token_ids: list[int] = field(default_factory=list, init=False)
    """Includes the stop token, if one ended the request."""
    stop_token_ids: frozenset[int] = field(init=False, repr=False)
    """Tokens that end the request: those of its params and ``eos_token_ids``."""
    max_total_tokens: int = field(default=0, init=False)
    """Prompt and output together never exceed this; set when the scheduler takes the request."""

    urgency: tuple[int, int] = field(default=(0, 0), init=False, repr=False)
    """(priority, arrival order): the smaller goes first and is preempted last."""
    num_known_tokens: int = field(default=0, init=False, repr=False)
    """Tokens that were known when it was admitted; those behind them are on the device first."""
    num_computed_tokens: int = field(default=0, init=False)
    """Tokens whose cache entries exist or will, once the scheduled steps have run; the most that
    there can be, where drafts are under way."""
    num_pending: int = field(default=0, init=False)
    """Scheduled steps, not updated yet, that sample for it: each brings a token at least."""
    num_in_flight: int = field(default=0, init=False, repr=False)
    """Scheduled steps with this request that are not updated yet: they write its blocks."""
    row: int = field(default=0, init=False, repr=False)
    """Its place on the device while it runs; 0: none."""
    num_sent: list[int] = field(default_factory=list, init=False, repr=False)
    """Of each table, entries that steps have told the runner."""
    num_left_sent: list[int] = field(default_factory=list, init=False, repr=False)
    """Of each table, entries that the runner knows to be given back."""
    num_cached_tokens: int = field(default=0, init=False)
    """Tokens that the prefix cache had when the request first ran."""
    num_preemptions: int = field(default=0, init=False)

    suspect_from: int | None = field(default=None, init=False)
    """The first output token that may be wrong: a graph drew it that was found wrong later."""

    tables: list[list[int]] = field(default_factory=list, init=False, repr=False)
    """Of each lifetime its blocks in order of position, the null block for those given back; kept
    by the cache manager, as all up to ``cache_epoch``. New lists after preemption."""
    num_left: list[int] = field(default_factory=list, init=False, repr=False)
    """Of each table, how many entries are given back."""
    num_indexed: list[int] = field(default_factory=list, init=False, repr=False)
    """Of each table, full blocks that were offered to the prefix index."""
    num_places: int = field(default=0, init=False, repr=False)
    """Tokens that have a place in every table."""
    commit_at: int = field(default=0, init=False, repr=False)
    """Computed tokens at which the manager wants to know."""
    checkpoints: list[Checkpoint] = field(default_factory=list, init=False, repr=False)
    """Copies of its states that are not offered yet."""
    state_begin: int = field(default=-1, init=False, repr=False)
    """Tokens before its last updated step, if that has verified drafts; else -1."""
    replay: int = field(default=0, init=False, repr=False)
    """Of the tokens that it was admitted with, those that its states have beside them until it
    computes."""
    junction: int = field(default=0, init=False, repr=False)
    """Tokens behind which a copy of its states was missing when it was admitted."""
    block_digests: list[bytes] = field(default_factory=list, init=False, repr=False)
    """Digests of its tokens, as far as the cache manager needed them."""
    cache_epoch: int = field(default=0, init=False, repr=False)
    """The prefix cache's epoch when the blocks were taken; kept by the cache manager."""

    first_scheduled_time: float | None = field(default=None, init=False, repr=False)
    first_token_time: float | None = field(default=None, init=False, repr=False)
    last_token_time: float | None = field(default=None, init=False, repr=False)
    finished_time: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        if self.params.ignore_eos:
            self.eos_token_ids = frozenset()
        self.stop_token_ids = self.eos_token_ids.union(self.params.stop_token_ids or ())
        # Logprobs come from computing a token; a cached one is not computed.
        if self.params.skip_reading_prefix_cache or self.params.prompt_logprobs is not None:
            self.skip_prefix_cache = True

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and the output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None
