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
takes a token whose value only the device knows yet, and where drafts are verified the device alone
knows how many tokens there are: the scheduler reckons with the most that there can be, and is
corrected in ``update``. What turns out superfluous, because the request had stopped, is dropped
there. Blocks that a scheduled step writes come free only in that step's ``update``: no two requests
use a block in steps that are under way together.

Rows: a request has a place on the device from its admission until it ends or is preempted, and
never moves. A row that comes free may be given out at once, since the device computes steps in
their order.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from operator import attrgetter

from reprise.cache import CacheManager, Hit
from reprise.cache.tables import Checkpoint
from reprise.engine.waiting_queue import WaitingQueue
from reprise.errors import CapacityError, ConfigError, RequestError
from reprise.request import FINISHED_STATUS, FinishReason, Request, RequestStatus
from reprise.speculation import room_for
from reprise.step import NULL_ROW, Admission, Step, TableEdit

logger = logging.getLogger(__name__)

_by_urgency = attrgetter("urgency")

RESERVE_FRACTION = 0.01
"""Of the cache, kept free at admission for those who run already, lest they be preempted soon."""


BLOCKS_AHEAD = 8
"""Most blocks that a request gets before it needs them, where there are plenty: a step that sends
no block tables costs the device and the host less."""
STEPS_AHEAD = 16
"""When one request needs a block, those that need one within so many steps get theirs too."""
AHEAD_FRACTION = 1 / 16
"""Of the free blocks, the most that all running requests together get ahead."""
LEAST_FREE = 2
"""Free blocks for each running request, with which each gets one ahead all the same."""


_Decodes = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool]]
"""Rows, counts, drafts and samples of a :class:`Step`."""


@dataclass(slots=True, eq=False)
class _Scheduled:
    """A step, and whose it is."""

    step: Step
    requests: list[Request]
    starts: list[int]
    """Of the chunks: where they begin."""
    checkpoints: Sequence[Checkpoint | None] = ()
    """Of the step's copies, what they make."""


@dataclass(slots=True)
class _Parts:
    """What a step is made of, while it is scheduled."""

    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    edits: list[list[TableEdit]] = field(default_factory=list)
    """Of each table."""


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


def check_fits(request_id: str, length: int, max_model_len: int, capacity: int) -> None:
    """Refuse a prompt that cannot be computed.

    Args:
        request_id: For messages.
        length: Of the prompt, in tokens.
        max_model_len: Most tokens of a request.
        capacity: Of the cache, in tokens.

    Raises:
        RequestError: It is empty.
        CapacityError: It does not fit the context or the cache.
    """
    if length == 0:
        raise RequestError(f"prompt of request {request_id!r} is empty: give at least one token")
    if length >= max_model_len:
        raise CapacityError(
            f"prompt of request {request_id!r} has {length} tokens and the context "
            f"holds {max_model_len}, output included: shorten it or raise max_model_len"
        )
    if length > capacity:
        raise CapacityError(
            f"prompt of request {request_id!r} has {length} tokens and the cache "
            f"holds {capacity}: shorten it or enlarge the cache"
        )


class Scheduler:
    """Owns all unfinished requests. Not thread-safe: one loop calls it.

    Args:
        cache: Where requests get their blocks; used by nobody else.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        max_model_len: Most tokens of a request, prompt and output together.
        reserve_blocks: Blocks of each pool that an admission leaves free while others run; None:
            1 %, and where windows move on, those of a step.
        num_drafts: Tokens that each decode verifies beside its newest one, at most.
        drafting: Says how many are drafted where so many requests run, of which 0 want any; None:
            always as many.
        lookahead: Tokens behind them for which what drafts has rows in the cache.
        blocks_ahead: Most blocks that a request gets before it needs them.

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
        num_drafts: int = 0,
        lookahead: int = 0,
        blocks_ahead: int = 0,
        drafting: Callable[[int], int] | None = None,
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_model_len", max_model_len)):
            if value < 1:
                raise ConfigError(f"{name}={value}: give at least 1")
        if max_num_batched_tokens < max_num_seqs * (1 + num_drafts):
            each = f" times {1 + num_drafts} tokens each" if num_drafts else ""
            raise ConfigError(
                f"max_num_batched_tokens={max_num_batched_tokens}: give at least "
                f"max_num_seqs={max_num_seqs}{each}, so that all requests can decode in one step"
            )
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        if reserve_blocks is None:
            self._reserve = cache.reserve(RESERVE_FRACTION, max_num_batched_tokens)
        else:
            self._reserve = [reserve_blocks] * len(cache.pools)
        self._num_drafts = num_drafts
        self._drafting = drafting
        self._drafted: int | None = None
        """Tokens to be drafted behind the requests of this step; None: as many as ever."""
        self._verified = num_drafts
        """Tokens that each decode of this step verifies."""
        self._lookahead = lookahead
        self._blocks_ahead = blocks_ahead
        self._decodes: _Decodes = ((), (), (), ())
        """Of the last decode step, what its :class:`Step` said of its requests."""
        self._forget_all()

        self._num_arrived = 0
        self._num_steps = 0
        self._num_decode_tokens = 0
        self._num_prefill_tokens = 0
        self._num_prompt_tokens = 0
        self.num_generated_tokens = 0
        """Of all requests, from the start."""
        self._num_preemptions = 0
        self._num_finished: dict[FinishReason, int] = {
            "stop": 0, "length": 0, "abort": 0, "error": 0,
        }  # fmt: skip

    def _forget_all(self) -> None:
        self._requests: dict[str, Request] = {}
        """All that are not finished."""
        self._waiting = WaitingQueue()
        self._running: list[Request] = []
        """By urgency. May contain finished requests while ``_running_is_stale``."""
        self._running_is_stale = False
        self._outstanding: deque[_Scheduled] = deque()
        """Scheduled and not updated."""
        self._free_rows = list(range(NULL_ROW + 1, NULL_ROW + 1 + self.max_num_seqs))
        """A heap."""
        self._num_holding_blocks = 0
        """Requests that do not run any more but whose blocks an outstanding step writes."""
        self._released: list[int] = []

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
        check_fits(request.request_id, length, self.max_model_len, self.cache.capacity)
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
        self,
        request: Request,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        surplus: int = 0,
    ) -> None:
        """End a request for a reason that only the caller can see, such as a stop string. If it
        has finished already, only its reason is replaced.

        Args:
            request: It has got a token at least.
            reason: Why.
            stop_reason: The string.
            surplus: Tokens behind the one that ended it, which are dropped.
        """
        if surplus:
            del request.token_ids[-surplus:], request.output_token_ids[-surplus:]
            self.num_generated_tokens -= surplus
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
    def num_waiting_tokens(self) -> int:
        """Tokens of the prompts of all waiting requests."""
        return self._waiting.num_prompt_tokens

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

    def recompute_owners(self, units: Collection[tuple[str, int]]) -> list[str]:
        """Have every running request computed again that owns one of the blocks, (what they are
        called, number) each, and forget what they held, because it is wrong. Returns the requests'
        ids."""
        self.cache.forget_blocks(units)
        running = self._live_running()
        owners = [each for each in running if self.cache.owns(each, units)]
        self._running = [each for each in running if each not in owners]
        for request in owners:
            self.cache.never_share(request)
            self._preempt(request, "blocks of it were overwritten")
        return [each.request_id for each in owners]

    def drop_steps(self) -> int:
        """Forget every step that awaits its update, as if none had run, and :meth:`recompute`.

        For when the results of these steps are lost. The runner must forget its requests too.
        """
        in_flight = [request for each in self._outstanding for request in each.requests]
        for request in dict.fromkeys(in_flight):
            request.num_in_flight = request.num_pending = 0
            if request.status is not RequestStatus.RUNNING and request.tables:
                self.cache.free(request)  # kept for these steps alone
        self._outstanding.clear()
        self._num_holding_blocks = 0
        count = self.recompute()
        self._released = []
        return count

    def requests_of(self, step: Step) -> Sequence[Request]:
        """The requests of an outstanding step, in its order."""
        for each in self._outstanding:
            if each.step is step:
                return each.requests
        raise ValueError(f"step {step.index} is not outstanding")

    def stats(self) -> SchedulerStats:
        lifetimes = self.cache.used_by_lifetime()
        return SchedulerStats(
            # Read alone: another thread than the engine's may ask.
            num_running=sum(each.finish_reason is None for each in self._running),
            num_waiting=len(self._waiting),
            num_blocks_used=self.cache.num_used,
            num_blocks=self.cache.num_blocks,
            cache_usage=self.cache.usage,
            lifetime_blocks_used={name: used for name, (used, _) in lifetimes.items()},
            lifetime_blocks={name: total for name, (_, total) in lifetimes.items()},
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

    def schedule(self) -> Step | None:
        """The next step, or None if nothing can be computed now: there is no work, or outstanding
        steps must be updated first."""
        preemptions = self._num_preemptions
        if self._drafting is not None:
            self._choose_drafts(self._drafting)
        parts = _Parts(edits=[[] for _ in self.cache.layout.tables])
        prefilling, starved = self._schedule_decodes(parts)
        num_decodes = len(parts.requests)
        budget = self.max_num_batched_tokens - num_decodes * (1 + self._verified)
        for request in prefilling:
            if budget == 0:
                break
            budget -= self._schedule_chunk(request, budget, parts)
            self._edit_table(request, parts)
        # Blocks that came free by force are for those who lacked them.
        if not starved and preemptions == self._num_preemptions:
            budget = self._admit(budget, parts)
        if not parts.requests:
            return None

        num_tokens = self.max_num_batched_tokens - budget
        rows, counts, drafts, samples = self._of_decodes(parts.requests, num_decodes)
        if len(parts.requests) > num_decodes:
            chunks = len(parts.requests) - num_decodes
            rows = [*rows, *(each.row for each in parts.requests[num_decodes:])]
            counts, samples = [*counts, *parts.counts], [*samples, *parts.samples]
            drafts = [*drafts, *([0] * chunks)]
        copies = self.cache.take_copies()
        step = Step(
            self._num_steps, rows, counts, drafts, samples, num_decodes, num_tokens,
            parts.admitted, parts.edits, self._released, [copy for copy, _ in copies],
            self._drafted,
        )  # fmt: skip
        self._released = []
        checkpoints = [checkpoint for _, checkpoint in copies]
        self._outstanding.append(_Scheduled(step, parts.requests, parts.starts, checkpoints))
        self._num_steps += 1
        self._num_decode_tokens += num_decodes
        self._num_prefill_tokens += sum(parts.counts)
        return step

    def _choose_drafts(self, drafting: Callable[[int], int]) -> None:
        """How many tokens are drafted in the next step. Those that it verifies are as many as were
        drafted where the number is still the same; of others some are missing, or too many."""
        running = self._running
        wanting = not running or any(each.params.num_drafts != 0 for each in running)
        self._drafted = drafting(len(running) if wanting else 0)
        self._verified = room_for(self._drafted)

    def _schedule_decodes(self, parts: _Parts) -> tuple[list[Request], bool]:
        """Schedule all requests whose tokens are all computed but the newest. Returns those with
        more left, and whether a request could not get a block."""
        # The hot loop of a serving engine: attribute access is what costs.
        width = 1 + self._verified
        reach = 1 + self._num_drafts + self._lookahead
        requests = parts.requests
        prefilling: list[Request] = []
        starved = needed = False
        # Preemption shortens the list while it is walked, never before the current position.
        for request in self._live_running():
            start = request.num_computed_tokens
            if start < request.num_known_tokens:
                prefilling.append(request)
                continue
            limit = request.max_total_tokens
            if len(request.token_ids) + request.num_pending >= limit:
                continue  # its last token is drawn already
            end = start + reach
            if end >= limit:
                end = limit - 1  # the last token is never computed
            if end > request.num_places:
                if not self._make_room(request, start, end):
                    starved = True
                    continue
                needed = True
            requests.append(request)
            request.num_computed_tokens = start + width
            request.num_pending += 1
            request.num_in_flight += 1
        if self.cache.has_states and not self._num_drafts:
            for request in requests:
                self.cache.checkpoint(request, request.num_computed_tokens - 1)
        if needed:
            for request in requests:
                self._get_ahead(request, STEPS_AHEAD * (1 + self._num_drafts))
                self._edit_table(request, parts)
        return prefilling, starved

    def _get_ahead(self, request: Request, least: int) -> None:
        """Give a request blocks for tokens to come, if it has none for the next ``least`` ones and
        there are plenty."""
        cache, computed = self.cache, request.num_computed_tokens
        each = cache.room / max(1, len(self._running))
        ahead = max(int(each * AHEAD_FRACTION), int(each >= LEAST_FREE))
        ahead = min(ahead, self._blocks_ahead) * cache.block_size
        wanted = min(computed + ahead, request.max_total_tokens - 1)
        if request.num_places - computed < least and wanted > request.num_places:
            cache.grow(request, computed, wanted)

    def _edit_table(self, request: Request, parts: _Parts) -> None:
        """Tell the runner what is new in the request's tables; with it, what has been given back
        since: nobody reads that."""
        for number, (blocks, edits) in enumerate(zip(request.tables, parts.edits, strict=True)):
            sent, left = request.num_sent[number], request.num_left[number]
            if sent < len(blocks):
                first = min(request.num_left_sent[number], sent)
                if first < min(left, sent):
                    edits.append(TableEdit(request.row, first, blocks[first : min(left, sent)]))
                edits.append(TableEdit(request.row, sent, blocks[sent:]))
                request.num_sent[number], request.num_left_sent[number] = len(blocks), left

    def _of_decodes(self, requests: list[Request], count: int) -> _Decodes:
        """Rows, tokens, drafts and samples of the first ``count`` requests; the same lists as long
        as the rows are the same."""
        rows = [each.row for each in requests[:count]]
        if rows != self._decodes[0] or (count and self._decodes[2][0] != self._verified):
            self._decodes = rows, [1] * count, [self._verified] * count, [True] * count
        return self._decodes

    def _schedule_chunk(self, request: Request, budget: int, parts: _Parts) -> int:
        """Schedule as much of the request as the budget allows; returns the number of tokens."""
        start = request.num_computed_tokens
        known = request.num_known_tokens
        end = self.cache.chunk_end(request, start, min(known, start + budget), known)
        end = self.cache.grow(request, start, end)
        if end <= start:
            return 0  # an update will bring blocks
        # Not before: without a step nobody copies, and an update would offer what is not there.
        self.cache.checkpoint(request, start, known)
        count, samples = end - start, end == known
        if samples and self._lookahead:  # drafts behind it that find no room do not count
            self.cache.grow(
                request, start, min(end + self._lookahead, request.max_total_tokens - 1)
            )
        parts.requests.append(request)
        parts.counts.append(count)
        parts.samples.append(samples)
        parts.starts.append(start)
        request.num_computed_tokens = start + count
        request.num_pending += samples
        request.num_in_flight += 1
        return count

    def _admit(self, budget: int, parts: _Parts) -> int:
        """Start waiting requests; returns what is left of the budget."""
        cache, waiting, running = self.cache, self._waiting, self._running
        while budget > 0 and len(running) < self.max_num_seqs and waiting:
            request = waiting.first()
            if request.num_in_flight:
                break  # just preempted: its pending token and its blocks are still to come
            if running and not cache.may_fit(request, self._reserve):
                break
            hit = cache.match(request)
            if not cache.admit(request, hit, self._reserve if running else ()):
                # What it would go on from may take the place that it needs.
                hit = Hit()
                if running or not cache.admit(request, hit):
                    break
            waiting.pop()
            num_tokens, num_cached = len(request.token_ids), hit.length
            request.num_computed_tokens = num_cached
            request.num_known_tokens = num_tokens
            request.status = RequestStatus.RUNNING
            if request.first_scheduled_time is None:
                request.first_scheduled_time = time.perf_counter()
                request.num_cached_tokens = num_cached
                self._num_prompt_tokens += request.num_prompt_tokens
                if cache.enable_prefix_caching and not request.skip_prefix_cache:
                    cache.record_lookup(num_tokens, num_cached)
            insort(running, request, key=_by_urgency)
            request.row = heappop(self._free_rows)
            request.num_sent = [0] * len(request.tables)
            request.num_left_sent = [0] * len(request.tables)
            parts.admitted.append(_admission(request))
            budget -= self._schedule_chunk(request, budget, parts)
            self._get_ahead(request, STEPS_AHEAD * (1 + self._num_drafts))
            self._edit_table(request, parts)
        return budget

    def _make_room(self, request: Request, begin: int, end: int) -> bool:
        """Give a running request room for these tokens, at the cost of the least urgent ones if
        need be. False if it cannot run in this step."""
        while self.cache.grow(request, begin, end) < end:
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
        self._free_row(request)
        self._waiting.push(request)

    # ------------------------------------------------------------------ a step's result

    def update(
        self,
        step: Step,
        sampled: Sequence[Sequence[int]],
        failed: Collection[int] = (),
        spoilt: Collection[int] = (),
    ) -> list[Request]:
        """Take the tokens that a step sampled. Steps are updated in the order of their scheduling.

        Args:
            step: The oldest outstanding one.
            sampled: The new tokens of each of the step's requests: none where it does not sample,
                else one and as many as were drafted at most. What follows a token that ends its
                request, and what was sampled for requests that have stopped meanwhile, is ignored.
            failed: Numbers of the step's requests that end, since nothing can be drawn for them.
                Nobody shares what was computed of them.
            spoilt: Numbers of the step's copies of states that were no finite numbers: nobody gets
                to see what they make.

        Returns:
            The requests that got tokens, of which some have finished by them, and those that have
            failed.

        Raises:
            RuntimeError: The step is not the oldest outstanding one.
            ValueError: ``sampled`` does not have one entry a request.
        """
        if not self._outstanding or self._outstanding[0].step is not step:
            raise RuntimeError(f"step {step.index} is not the oldest that awaits its update")
        requests, starts = self._outstanding[0].requests, self._outstanding[0].starts
        if len(sampled) != len(requests):
            raise ValueError(f"{len(sampled)} results for {len(requests)} requests")
        for number, checkpoint in enumerate(self._outstanding.popleft().checkpoints):
            if checkpoint is not None:
                checkpoint.sound = number not in spoilt
        # The other hot loop, see _schedule_decodes.
        now, running = time.perf_counter(), RequestStatus.RUNNING
        num_decodes = step.num_decodes
        width = 1 + step.drafts[0] if num_decodes else 1
        updated: list[Request] = []
        generated = 0
        for number in failed:
            request = requests[number]
            if request.finish_reason is None:
                self.cache.forget(request)
                self._finish(request, "error", None)
                updated.append(request)
        for number, (request, tokens) in enumerate(zip(requests, sampled, strict=True)):
            request.num_in_flight -= 1
            if request.finish_reason is None:
                known, last = request.token_ids, None
                had = len(known)
                if number < num_decodes:
                    computed = had + len(tokens) - 1
                    request.num_pending -= 1
                    if len(tokens) != width and request.status is running:
                        request.num_computed_tokens -= width - len(tokens)
                else:
                    computed = starts[number - num_decodes] + step.counts[number]
                    request.num_pending -= step.samples[number]
                if tokens:
                    updated.append(request)
                    request.last_token_time = now
                    if request.first_token_time is None:
                        request.first_token_time = now
                    output, stops = request.output_token_ids, request.stop_token_ids
                    most = request.max_total_tokens
                    for token in tokens:
                        known.append(token)
                        output.append(token)
                        if len(known) >= most or (
                            token in stops and len(output) >= request.params.min_tokens
                        ):
                            last = token
                            break
                    generated += len(known) - had
                # Before it may end and lose its blocks. Its last token is never computed.
                if computed >= request.commit_at:
                    computed = min(computed, len(known), request.max_total_tokens - 1)
                    self.cache.commit(request, computed)
                if last is not None:
                    self._finish_at(request, last)
            if request.status is running or request.num_in_flight:
                continue
            if request.tables:  # kept for this step, the last one that writes them
                self.cache.free(request)
                self._num_holding_blocks -= 1
        self.num_generated_tokens += generated
        return updated

    def _finish_at(self, request: Request, token: int) -> None:
        """End the request, whose last token this is."""
        length = len(request.token_ids)
        long_enough = len(request.output_token_ids) >= request.params.min_tokens
        if token in request.stop_token_ids and long_enough:
            self._finish(request, "stop", None if token in request.eos_token_ids else token)
            return
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
            self._free_row(request)
            self._drop_blocks(request)
        else:
            self._waiting.discard(request)

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

    def _free_row(self, request: Request) -> None:
        self._released.append(request.row)
        heappush(self._free_rows, request.row)
        request.row = NULL_ROW

    def _live_running(self) -> list[Request]:
        if self._running_is_stale:
            self._running = [r for r in self._running if r.finish_reason is None]
            self._running_is_stale = False
        return self._running


def _admission(request: Request) -> Admission:
    return Admission(
        row=request.row,
        request_id=request.request_id,
        start=request.num_computed_tokens,
        token_ids=list(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        limit=request.max_total_tokens - 1,
        params=request.params,
        seed=request.seed,
        stop_token_ids=request.stop_token_ids,
        bad_words=request.bad_words,
    )
