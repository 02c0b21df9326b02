"""Decides which requests compute which tokens in the next step.

Continuous batching with chunked prefill: each step first takes one token of every request that
decodes, then continues prompts that are partly computed, then admits waiting requests, until the
token budget is spent. A long prompt thus never stalls requests that decode.

Order: smaller (priority, arrival) first, everywhere. A waiting request gets the blocks of all its
known tokens when it is admitted, so that only decodes can run out of blocks; then the least urgent
running request is preempted: it gives its blocks back and later recomputes what the prefix cache
has not kept. The most urgent one is never preempted for another, so there is always progress. A
waiting request never preempts a running one, however urgent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from reprise.cache import CacheManager, Hit
from reprise.engine.blocks_ahead import BlocksAhead
from reprise.engine.roster import Roster
from reprise.engine.scheduler_counts import SchedulerCounts
from reprise.engine.step_plan import RowLists, ScheduledStep, StepPlan
from reprise.request import Request
from reprise.speculation import room_for
from reprise.step import Step


class StepPlanner:
    """Plans one step after the other.

    Args:
        cache: Where requests get their blocks.
        roster: Knows which requests wait and run.
        counts: Gets what is planned.
        max_requests: Most in a step.
        max_tokens: Most in a step.
        reserve: Of each pool, blocks that an admission leaves free while others run.
        num_drafts: Tokens that each decode verifies beside its newest one, at most.
        lookahead: Tokens behind them for which what drafts has rows in the cache.
        blocks_ahead: Most blocks that a request gets before it needs them.
        drafting: As of :class:`reprise.engine.scheduler.Scheduler`.
        resting: As of it.
    """

    def __init__(
        self,
        cache: CacheManager,
        roster: Roster,
        counts: SchedulerCounts,
        *,
        max_requests: int,
        max_tokens: int,
        reserve: Sequence[int],
        num_drafts: int,
        lookahead: int,
        blocks_ahead: int,
        drafting: Callable[[int], int] | None,
        resting: Callable[[int], bool] | None,
    ) -> None:
        self._cache, self._roster, self._counts = cache, roster, counts
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self._reserve = reserve
        self._num_drafts = num_drafts
        self.drafting, self.resting = drafting, resting
        self._drafted: int | None = None
        """Tokens to be drafted behind the requests of this step; None: as many as ever."""
        self._rests = False
        """What drafts leaves out the decodes of this step."""
        self._verified = num_drafts
        """Tokens that each decode of this step verifies."""
        self._lookahead = lookahead
        self._ahead = BlocksAhead(cache, blocks_ahead, 1 + num_drafts)
        self._lists = RowLists()

    def next_step(self) -> ScheduledStep | None:
        """The next step, whose tokens count as computed from now on; None: nothing can be computed
        now."""
        preemptions = self._counts.preemptions
        if self.drafting is not None:
            self._choose_drafts(self.drafting)
        plan = StepPlan([[] for _ in self._cache.layout.tables])
        prefilling, starved = self._schedule_decodes(plan)
        num_decodes = len(plan.requests)
        budget = self.max_tokens - num_decodes * (1 + self._verified)
        for request in prefilling:
            if budget == 0:
                break
            budget -= self._schedule_chunk(request, budget, plan)
            plan.edit_tables(request)
        # Blocks that came free by force are for the requests that lacked them.
        if not starved and preemptions == self._counts.preemptions:
            budget = self._admit(budget, plan)
        if not plan.requests:
            return None

        copies = self._cache.checkpoints.take_copies()
        step = Step(
            self._counts.steps,
            *self._lists.of(plan, num_decodes, self._verified),
            num_decodes,
            self.max_tokens - budget,
            plan.admitted,
            plan.edits,
            self._roster.take_released(),
            [copy for copy, _ in copies],
            self._drafted,
            self._rests,
        )
        self._counts.steps += 1
        self._counts.decode_tokens += num_decodes
        self._counts.prefill_tokens += sum(plan.counts)
        checkpoints = [checkpoint for _, checkpoint in copies]
        return ScheduledStep(step, plan.requests, plan.starts, checkpoints)

    def _choose_drafts(self, drafting: Callable[[int], int]) -> None:
        """How many tokens are drafted in the next step. Those that it verifies are as many as were
        drafted where the number is still the same; of others some are missing, or too many."""
        running = self._roster.running()
        wanting = not running or any(each.params.num_drafts != 0 for each in running)
        self._drafted = drafting(len(running) if wanting else 0)
        self._verified = room_for(self._drafted)
        self._rests = (
            wanting and self._drafted == 0
            and self.resting is not None and self.resting(len(running))
        )  # fmt: skip

    def _schedule_decodes(self, plan: StepPlan) -> tuple[list[Request], bool]:
        """Schedule all requests whose tokens are all computed but the newest. Returns those with
        more left, and whether a request could not get a block."""
        # The hot loop of a serving engine: attribute access is what costs.
        width = 1 + self._verified
        reach = 1 + self._num_drafts + self._lookahead
        requests = plan.requests
        prefilling: list[Request] = []
        starved = needed = False
        # Preemption shortens the list while it is walked, never before the current position.
        for request in self._roster.running():
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
        checkpoints = self._cache.checkpoints
        if checkpoints.any:
            for request in requests:
                computed = request.num_computed_tokens - width
                if self._num_drafts:
                    checkpoints.keep_behind_drafts(
                        request, computed, request.num_pending - 1, request.num_known_tokens
                    )
                else:
                    checkpoints.keep(request, computed)
        if needed:
            num_running = len(self._roster.running())
            for request in requests:
                self._ahead.give(request, num_running)
                plan.edit_tables(request)
        return prefilling, starved

    def _schedule_chunk(self, request: Request, budget: int, plan: StepPlan) -> int:
        """Schedule as much of the request as the budget allows; returns the number of tokens."""
        start = request.num_computed_tokens
        known, checkpoints = request.num_known_tokens, self._cache.checkpoints
        end = checkpoints.chunk_end(request, start, min(known, start + budget), known)
        end = self._cache.grow(request, start, end)
        if end <= start:
            return 0  # an update will bring blocks
        # Not before: without a step nothing is copied, and an update would offer what is not there.
        checkpoints.keep(request, start, known, replay=request.replay)
        request.replay = 0
        count, samples = end - start, end == known
        if samples and self._lookahead:  # drafts behind it that find no room do not count
            self._cache.grow(
                request, start, min(end + self._lookahead, request.max_total_tokens - 1)
            )
        plan.add_chunk(request, start, count, samples)
        request.num_computed_tokens = start + count
        request.num_pending += samples
        request.num_in_flight += 1
        return count

    def _admit(self, budget: int, plan: StepPlan) -> int:
        """Start waiting requests; returns what is left of the budget."""
        cache, roster, running = self._cache, self._roster, self._roster.running()
        waiting = roster.waiting
        while budget > 0 and len(running) < self.max_requests and waiting:
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
            roster.admit()
            num_tokens, num_cached = len(request.token_ids), hit.length
            request.num_computed_tokens = num_cached
            request.num_known_tokens = num_tokens
            if request.first_scheduled_time is None:
                request.first_scheduled_time = time.perf_counter()
                request.num_cached_tokens = num_cached
                self._counts.prompt_tokens += request.num_prompt_tokens
                if cache.enable_prefix_caching and not request.skip_prefix_cache:
                    cache.record_lookup(num_tokens, num_cached)
            plan.admit(request)
            budget -= self._schedule_chunk(request, budget, plan)
            self._ahead.give(request, len(running))
            plan.edit_tables(request)
        return budget

    def _make_room(self, request: Request, begin: int, end: int) -> bool:
        """Give a running request room for these tokens, at the cost of the least urgent ones if
        need be. False if it cannot run in this step."""
        while self._cache.grow(request, begin, end) < end:
            if self._roster.num_holding_blocks:
                return False  # an update will bring blocks; more victims might not be needed
            if self._roster.preempt_last("out of cache blocks") is request:
                return False
        return True
