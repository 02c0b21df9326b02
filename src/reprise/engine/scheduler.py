"""Decides which requests compute which tokens in the next step.

Continuous batching with chunked prefill: each step first takes one token of every request that
decodes, then continues prompts that are partly computed, then admits waiting requests, until the
token budget is spent. A long prompt thus never stalls those who decode.

Order: smaller (priority, arrival) first, everywhere. A waiting request gets the blocks of all its
known tokens when it is admitted, so that only decodes can run out of blocks; then the least urgent
running request is preempted: it gives its blocks back and later recomputes what the prefix cache
has not kept. The most urgent one is never preempted for another, so there is always progress. A
waiting request never preempts a running one, however urgent.

One step ahead: ``schedule`` may be called before the step before has been updated. A decode then
takes a token whose value only the device knows yet (*pending*). What turns out superfluous, because
the request had stopped, is dropped in ``update``. Blocks that a scheduled step writes come free
only in that step's ``update``: no two requests use a block in steps that are under way together.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter

from reprise.cache import CacheManager
from reprise.engine.waiting_queue import WaitingQueue
from reprise.errors import CapacityError, ConfigError, RequestError
from reprise.request import FINISHED_STATUS, FinishReason, Request, RequestStatus
from reprise.step import ScheduledRequest, ScheduledStep

logger = logging.getLogger(__name__)

_by_urgency = attrgetter("urgency")
_by_row = attrgetter("request.row")

RESERVE_FRACTION = 0.01
"""Of the cache, kept free at admission for those who run already, lest they be preempted soon."""


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


class Scheduler:
    """Owns all unfinished requests. Not thread-safe: one loop calls it.

    Args:
        cache: Where requests get their blocks; used by nobody else.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        max_model_len: Most tokens of a request, prompt and output together.
        reserve_blocks: Blocks that an admission leaves free while others run; None: 1 %.

    Raises:
        ConfigError: A limit is below 1, or the token budget cannot hold all decodes.
    """

    def __init__(
        self,
        cache: CacheManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        reserve_blocks: int | None = None,
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_model_len", max_model_len)):
            if value < 1:
                raise ConfigError(f"{name}={value}: give at least 1")
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={max_num_batched_tokens}: give at least "
                f"max_num_seqs={max_num_seqs}, so that all requests can decode in one step"
            )
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        if reserve_blocks is None:
            reserve_blocks = int(cache.pool.num_blocks * RESERVE_FRACTION)
        self._reserve_blocks = reserve_blocks
        self._forget_all()

        self._num_arrived = 0
        self._num_steps = 0
        self._num_decode_tokens = 0
        self._num_prefill_tokens = 0
        self._num_prompt_tokens = 0
        self.num_generated_tokens = 0
        """Of all requests, from the start."""
        self._num_preemptions = 0
        self._num_finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0}

    def _forget_all(self) -> None:
        self._requests: dict[str, Request] = {}
        """All that are not finished."""
        self._waiting = WaitingQueue()
        self._running: list[Request] = []
        """By urgency. May contain finished requests while ``_running_is_stale``."""
        self._running_is_stale = False
        self._outstanding: deque[ScheduledStep] = deque()
        """Scheduled and not updated."""
        self._num_holding_blocks = 0
        """Requests that do not run any more but whose blocks an outstanding step writes."""
        self._released: list[str] = []
        self._last_decodes: list[Request] = []
        """By row, if the last step was a decode step."""

    # ------------------------------------------------------------------ requests come and go

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            RequestError: The prompt is empty, or another unfinished request has the same id.
            CapacityError: The prompt does not fit the context or the cache.
        """
        length = len(request.prompt_token_ids)
        if request.request_id in self._requests:
            raise RequestError(
                f"request_id={request.request_id!r}: a request with this id is running, give "
                "each a new one"
            )
        if length == 0:
            raise RequestError(
                f"prompt of request {request.request_id!r} is empty: give at least one token"
            )
        if length >= self.max_model_len:
            raise CapacityError(
                f"prompt of request {request.request_id!r} has {length} tokens and the context "
                f"holds {self.max_model_len}, output included: shorten it or raise max_model_len"
            )
        if length > self.cache.capacity:
            raise CapacityError(
                f"prompt of request {request.request_id!r} has {length} tokens and the cache "
                f"holds {self.cache.capacity}: shorten it or enlarge the cache"
            )
        # The last token is never computed, so it needs no place in the cache.
        longest = min(self.max_model_len, self.cache.capacity + 1)
        if request.params.max_tokens is not None:
            longest = min(longest, length + request.params.max_tokens)
        request.max_total_tokens = longest
        request.urgency = (request.priority, self._num_arrived)
        self._num_arrived += 1
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request early. Returns it, or None if it is unknown or has finished already."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "abort", None)
        return request

    def finish(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """End a request for a reason that only the caller can see, such as a stop string. If it
        has finished already, only its reason is replaced."""
        if request.finish_reason is None:
            self._finish(request, reason, stop_reason)
            return
        self._num_finished[request.finish_reason] -= 1
        self._num_finished[reason] += 1
        self._set_finished(request, reason, stop_reason)

    @property
    def has_work(self) -> bool:
        """A request is unfinished, or a scheduled step awaits its update."""
        return bool(self._requests or self._outstanding)

    @property
    def num_outstanding(self) -> int:
        """Steps that are scheduled and not updated."""
        return len(self._outstanding)

    def start_over(self) -> None:
        """Abort every request, drop every step and forget every cached prefix.

        For when a step failed, or an interruption came at any line: relies on nothing that may
        be half-changed. The runner must forget its requests too.
        """
        for request in self._requests.values():
            if request.finish_reason is None:
                self._set_finished(request, "abort", None)
                request.finished_time = time.perf_counter()
                self._num_finished["abort"] += 1
        self._forget_all()
        self.cache.start_over()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; requests that run keep what they have."""
        self.cache.reset_prefix_cache()

    def recompute(self) -> int:
        """Have every running request computed again from its tokens and forget every cached
        prefix, because what the cache holds may be wrong. Returns the number of requests."""
        self.cache.reset_prefix_cache()
        running = self._live_running()
        self._running = []
        for request in running:
            self._preempt(request, "what it computed may be wrong")
        return len(running)

    def recompute_owners(self, blocks: Collection[int]) -> list[str]:
        """Have every running request computed again that owns one of the blocks, and forget what
        they held, because it is wrong. Returns the requests' ids."""
        self.cache.forget_blocks(blocks)
        running = self._live_running()
        owners = [each for each in running if not set(blocks).isdisjoint(each.block_ids)]
        self._running = [each for each in running if each not in owners]
        for request in owners:
            self.cache.never_share(request)
            self._preempt(request, "blocks of it were overwritten")
        return [each.request_id for each in owners]

    def drop_steps(self) -> int:
        """Forget every step that awaits its update, as if none had run, and :meth:`recompute`.

        For when the results of these steps are lost. The runner must forget its requests too.
        """
        in_flight = [each.request for step in self._outstanding for each in step.requests]
        for request in dict.fromkeys(in_flight):
            request.num_in_flight = request.num_pending = 0
            if request.status is not RequestStatus.RUNNING and request.block_ids:
                self.cache.free(request)  # kept for these steps alone
        self._outstanding.clear()
        self._num_holding_blocks = 0
        self._last_decodes = []
        count = self.recompute()
        self._released = []
        return count

    def stats(self) -> SchedulerStats:
        pool = self.cache.pool
        return SchedulerStats(
            # Read alone: another thread than the engine's may ask.
            num_running=sum(each.finish_reason is None for each in self._running),
            num_waiting=len(self._waiting),
            num_blocks_used=pool.num_used,
            num_blocks=pool.num_blocks - 1,
            cache_usage=self.cache.usage,
            total_steps=self._num_steps,
            total_decode_tokens=self._num_decode_tokens,
            total_prefill_tokens=self._num_prefill_tokens,
            total_prompt_tokens=self._num_prompt_tokens,
            total_generated_tokens=self.num_generated_tokens,
            total_preemptions=self._num_preemptions,
            total_prefix_queries=self.cache.prefix_queries,
            total_prefix_hits=self.cache.prefix_hits,
            total_finished=dict(self._num_finished),
        )

    # ------------------------------------------------------------------ the next step

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None if nothing can be computed now: there is no work, or outstanding
        steps must be updated first."""
        preemptions = self._num_preemptions
        decodes, prefilling, starved = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(decodes)
        chunks: list[ScheduledRequest] = []
        for request in prefilling:
            if budget == 0:
                break
            budget -= self._schedule_chunk(request, budget, chunks)
        # Blocks that came free by force are for those who lacked them.
        if not starved and preemptions == self._num_preemptions:
            budget = self._admit(budget, chunks)
        if not decodes and not chunks:
            return None

        num_tokens = self.max_num_batched_tokens - budget
        continues = self._assign_rows(decodes, chunks)
        step = ScheduledStep(
            self._num_steps,
            decodes + chunks,
            len(decodes),
            num_tokens,
            self._released,
            continues,
        )
        self._released = []
        self._outstanding.append(step)
        self._num_steps += 1
        self._num_decode_tokens += len(decodes)
        self._num_prefill_tokens += num_tokens - len(decodes)
        return step

    def _schedule_decodes(self) -> tuple[list[ScheduledRequest], list[Request], bool]:
        """Schedule all requests with one token left to compute. Returns these, the requests with
        more than one left, and whether a request could not get a block."""
        # The hot loop of a serving engine: attribute access is what costs.
        block_size = self.cache.block_size
        decodes: list[ScheduledRequest] = []
        prefilling: list[Request] = []
        starved = False
        # Preemption shortens the list while it is walked, never before the current position.
        for request in self._live_running():
            pending = request.num_pending
            start = request.num_computed_tokens
            total = len(request.token_ids) + pending
            if total - start > 1:
                prefilling.append(request)
                continue
            if total >= request.max_total_tokens:
                continue  # its last token is pending
            blocks = request.block_ids
            if start >= len(blocks) * block_size and not self._make_room(request, total):
                starved = True
                continue
            decodes.append(ScheduledRequest(request, start, 1, blocks, True, pending > 0))
            request.num_computed_tokens = total
            request.num_pending = pending + 1
            request.num_in_flight += 1
        return decodes, prefilling, starved

    def _assign_rows(self, decodes: list[ScheduledRequest], chunks: list[ScheduledRequest]) -> bool:
        """Put the decodes into the order of their rows; chunks come behind. Returns whether the
        step continues the last one: see :class:`ScheduledStep`."""
        decodes.sort(key=_by_row)
        requests = [each.request for each in decodes]
        if not chunks and requests == self._last_decodes:
            return True
        _keep_rows(decodes)
        for row, chunk in enumerate(chunks, len(decodes)):
            chunk.request.row = row
        self._last_decodes = [] if chunks else [each.request for each in decodes]
        return False

    def _schedule_chunk(self, request: Request, budget: int, chunks: list[ScheduledRequest]) -> int:
        """Schedule as much of the request as the budget allows; returns the number of tokens."""
        start = request.num_computed_tokens
        remaining = len(request.token_ids) - start
        count = min(remaining, budget)
        samples = count == remaining
        chunks.append(
            ScheduledRequest(request, start, count, request.block_ids, samples, pending=False)
        )
        request.num_computed_tokens = start + count
        request.num_pending += samples
        request.num_in_flight += 1
        return count

    def _admit(self, budget: int, chunks: list[ScheduledRequest]) -> int:
        """Start waiting requests; returns what is left of the budget."""
        cache, waiting, running = self.cache, self._waiting, self._running
        while budget > 0 and len(running) < self.max_num_seqs and waiting:
            request = waiting.first()
            if request.num_in_flight:
                break  # just preempted: its pending token and its blocks are still to come
            cached = cache.match(request)
            num_tokens = len(request.token_ids)
            reserve = self._reserve_blocks if running else 0
            if not cache.allocate(request, num_tokens, cached, reserve):
                break
            waiting.pop()
            num_cached = len(cached) * cache.block_size
            request.num_computed_tokens = num_cached
            request.status = RequestStatus.RUNNING
            if request.first_scheduled_time is None:
                request.first_scheduled_time = time.perf_counter()
                request.num_cached_tokens = num_cached
                self._num_prompt_tokens += request.num_prompt_tokens
                if cache.enable_prefix_caching and not request.skip_prefix_cache:
                    cache.record_lookup(num_tokens, num_cached)
            insort(running, request, key=_by_urgency)
            budget -= self._schedule_chunk(request, budget, chunks)
        return budget

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Give a running request room for its tokens, at the cost of the least urgent ones if
        need be. False if it cannot run in this step."""
        while not self.cache.allocate(request, num_tokens):
            if self._num_holding_blocks:
                return False  # an update will bring blocks; more victims might not be needed
            victim = self._running.pop()
            self._preempt(victim, "out of cache blocks")
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, reason: str) -> None:
        logger.debug("request %s is preempted: %s", request.request_id, reason)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._drop_blocks(request)
        self._released.append(request.request_id)
        self._waiting.push(request)

    # ------------------------------------------------------------------ a step's result

    def update(self, step: ScheduledStep, sampled: Sequence[int | None]) -> list[Request]:
        """Take the tokens that a step sampled. Steps are updated in the order of their scheduling.

        Args:
            step: The oldest outstanding one.
            sampled: The new token of each of the step's requests; None where it does not sample.
                What was sampled for requests that have stopped meanwhile is ignored.

        Returns:
            The requests that got a token; some have finished by it.

        Raises:
            RuntimeError: The step is not the oldest outstanding one.
            ValueError: ``sampled`` does not have one entry a request.
        """
        if not self._outstanding or self._outstanding[0] is not step:
            raise RuntimeError(f"step {step.index} is not the oldest that awaits its update")
        if len(sampled) != len(step.requests):
            raise ValueError(f"{len(sampled)} results for {len(step.requests)} requests")
        self._outstanding.popleft()
        # The other hot loop, see _schedule_decodes.
        cache, now, running = self.cache, time.perf_counter(), RequestStatus.RUNNING
        block_size = cache.block_size
        updated: list[Request] = []
        for scheduled, token in zip(step.requests, sampled, strict=True):
            request = scheduled.request
            request.num_in_flight -= 1
            if request.finish_reason is None:
                computed = scheduled.start + scheduled.num_tokens
                if computed >= (request.num_indexed_blocks + 1) * block_size:
                    cache.commit(request, computed)
                if token is not None:
                    request.num_pending -= 1
                    token_ids = request.token_ids
                    token_ids.append(token)
                    request.output_token_ids.append(token)
                    request.last_token_time = now
                    if request.first_token_time is None:
                        request.first_token_time = now
                    updated.append(request)
                    if (
                        len(token_ids) >= request.max_total_tokens
                        or token in request.stop_token_ids
                    ):
                        self._finish_at(request, token)
            if request.status is running or request.num_in_flight:
                continue
            if request.block_ids:  # kept for this step, the last one that writes them
                cache.free(request)
                self._num_holding_blocks -= 1
        self.num_generated_tokens += len(updated)
        return updated

    def _finish_at(self, request: Request, token: int) -> None:
        """End the request if its newest token is the last one."""
        length = len(request.token_ids)
        long_enough = len(request.output_token_ids) >= request.params.min_tokens
        if token in request.stop_token_ids and long_enough:
            self._finish(request, "stop", None if token in request.eos_token_ids else token)
        elif length >= request.max_total_tokens:
            if length > self.cache.capacity:
                logger.warning(
                    "request %s ends at %d tokens: it fills the whole cache",
                    request.request_id,
                    length,
                )
            self._finish(request, "length", None)

    # ------------------------------------------------------------------ the end of a request

    def _finish(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None
    ) -> None:
        was_running = request.status is RequestStatus.RUNNING
        self._set_finished(request, reason, stop_reason)
        request.finished_time = time.perf_counter()
        self._num_finished[reason] += 1
        del self._requests[request.request_id]
        if was_running:
            self._running_is_stale = True
            self._released.append(request.request_id)
            self._drop_blocks(request)
        else:
            self._waiting.count_discarded()

    @staticmethod
    def _set_finished(
        request: Request, reason: FinishReason, stop_reason: int | str | None
    ) -> None:
        request.status = FINISHED_STATUS[reason]
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def _drop_blocks(self, request: Request) -> None:
        """Free the blocks of a request that runs no more, now or with the last update of a step
        that writes them."""
        if request.num_in_flight:
            self._num_holding_blocks += 1
        else:
            self.cache.free(request)

    def _live_running(self) -> list[Request]:
        if self._running_is_stale:
            self._running = [r for r in self._running if r.finish_reason is None]
            self._running_is_stale = False
        return self._running


def _keep_rows(decodes: list[ScheduledRequest]) -> None:
    """Order them so that each keeps its row of the step before if that still exists: what the
    device holds of a request, such as its block table, then need not be sent again."""
    rows: list[ScheduledRequest | None] = [None] * len(decodes)
    moved: list[ScheduledRequest] = []
    for each in decodes:
        row = each.request.row
        if 0 <= row < len(rows) and rows[row] is None:
            rows[row] = each
        else:
            moved.append(each)
    for row, kept in enumerate(rows):
        each = moved.pop() if kept is None else kept
        each.request.row = row
        decodes[row] = each
