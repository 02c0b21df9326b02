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
corrected in ``update``.

Who has which row and which blocks is the roster's to know (``roster.py``); what a step's tokens do
to their requests is told in ``step_results.py``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from reprise.cache import CacheManager, Hit
from reprise.engine.blocks_ahead import BlocksAhead
from reprise.engine.prompt import check_fits
from reprise.engine.roster import Roster
from reprise.engine.scheduler_counts import SchedulerCounts, SchedulerStats
from reprise.engine.step_plan import RowLists, ScheduledStep, StepPlan
from reprise.engine.step_results import StepResults
from reprise.errors import ConfigError
from reprise.request import FinishReason, Request
from reprise.speculation import room_for
from reprise.step import Step

RESERVE_FRACTION = 0.01
"""Of the cache, kept free at admission for those who run already, lest they be preempted soon."""


class Scheduler:
    """Plans steps and takes their tokens. Not thread-safe: one loop calls it.

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
        resting: Says whether what drafts may leave out steps of so many requests that draft
            nothing; None: it never does.
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
        resting: Callable[[int], bool] | None = None,
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
        self.num_drafts = num_drafts
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
        self._counts = SchedulerCounts()
        self._roster = Roster(cache, max_num_seqs, self._counts)
        self._results = StepResults(cache, self._roster, self._counts, verifies=num_drafts > 0)
        self._num_arrived = 0
        self._outstanding: deque[ScheduledStep] = deque()
        """Scheduled and not updated."""

    # ------------------------------------------------------------------ requests come and go

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            RequestError: The prompt is empty, or another unfinished request has the same id.
            CapacityError: The prompt does not fit the context or the cache.
        """
        length = len(request.prompt_token_ids)
        check_fits(request.request_id, length, self.max_model_len, self.cache.capacity)
        # The last token is never computed, so it needs no place in the cache.
        longest = min(self.max_model_len, self.cache.capacity + 1)
        if request.params.max_tokens is not None:
            longest = min(longest, length + request.params.max_tokens)
        request.max_total_tokens = longest
        request.urgency = (request.priority, self._num_arrived)
        self._roster.add(request)
        self._num_arrived += 1

    def abort(self, request_id: str) -> Request | None:
        """End a request early. Returns it, or None if it is unknown or has finished already."""
        request = self._roster.get(request_id)
        if request is not None:
            self._roster.finish(request, "abort")
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
            self._counts.generated_tokens -= surplus
        self._roster.finish(request, reason, stop_reason)

    @property
    def has_work(self) -> bool:
        """A request is unfinished, or a scheduled step awaits its update."""
        return bool(self._roster or self._outstanding)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of the prompts of all waiting requests."""
        return self._roster.waiting.num_prompt_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Of all requests, from the start."""
        return self._counts.generated_tokens

    @property
    def num_outstanding(self) -> int:
        """Steps that are scheduled and not updated."""
        return len(self._outstanding)

    def start_over(self) -> None:
        """Abort every request, drop every step and forget every cached prefix.

        For when a step failed, or an interruption came at any line: relies on nothing that may
        be half-changed. The runner must forget its requests too.
        """
        self._roster.start_over()
        self._outstanding.clear()
        self.cache.start_over()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; requests that run keep what they have."""
        self.cache.reset_prefix_cache()

    def recompute(self) -> int:
        """Have every running request computed again from its tokens and forget every cached
        prefix, because what the cache holds may be wrong. Returns the number of requests."""
        self.cache.reset_prefix_cache()
        running = list(self._roster.running())
        self._roster.preempt(running, "what it computed may be wrong")
        return len(running)

    def recompute_owners(self, units: Collection[tuple[str, int]]) -> list[str]:
        """Have every running request computed again that owns one of the blocks, (what they are
        called, number) each, and forget what they held, because it is wrong. Returns the requests'
        ids."""
        self.cache.forget_blocks(units)
        owners = [each for each in self._roster.running() if self.cache.owns(each, units)]
        for request in owners:
            self.cache.never_share(request)
        self._roster.preempt(owners, "blocks of it were overwritten")
        return [each.request_id for each in owners]

    def drop_steps(self) -> int:
        """Forget every step that awaits its update, as if none had run, and :meth:`recompute`.

        For when the results of these steps are lost. The runner must forget its requests too.
        """
        self._roster.drop_steps(request for each in self._outstanding for request in each.requests)
        self._outstanding.clear()
        count = self.recompute()
        self._roster.take_released()  # the runner forgets all rows
        return count

    def requests_of(self, step: Step) -> Sequence[Request]:
        """The requests of an outstanding step, in its order."""
        for each in self._outstanding:
            if each.step is step:
                return each.requests
        raise ValueError(f"step {step.index} is not outstanding")

    def stats(self) -> SchedulerStats:
        lifetimes = self.cache.used_by_lifetime()
        counts, roster = self._counts, self._roster
        return SchedulerStats(
            num_running=roster.num_running,
            num_waiting=len(roster.waiting),
            num_blocks_used=self.cache.num_used,
            num_blocks=self.cache.num_blocks,
            cache_usage=self.cache.usage,
            lifetime_blocks_used={name: used for name, (used, _) in lifetimes.items()},
            lifetime_blocks={name: total for name, (_, total) in lifetimes.items()},
            total_steps=counts.steps,
            total_decode_tokens=counts.decode_tokens,
            total_prefill_tokens=counts.prefill_tokens,
            total_prompt_tokens=counts.prompt_tokens,
            total_generated_tokens=counts.generated_tokens,
            total_preemptions=counts.preemptions,
            total_prefix_queries=self.cache.prefix_queries,
            total_prefix_hits=self.cache.prefix_hits,
            total_finished=dict(counts.finished),
        )

    # ------------------------------------------------------------------ the next step

    def schedule(self) -> Step | None:
        """The next step, or None if nothing can be computed now: there is no work, or outstanding
        steps must be updated first."""
        preemptions = self._counts.preemptions
        if self.drafting is not None:
            self._choose_drafts(self.drafting)
        plan = StepPlan([[] for _ in self.cache.layout.tables])
        prefilling, starved = self._schedule_decodes(plan)
        num_decodes = len(plan.requests)
        budget = self.max_num_batched_tokens - num_decodes * (1 + self._verified)
        for request in prefilling:
            if budget == 0:
                break
            budget -= self._schedule_chunk(request, budget, plan)
            plan.edit_tables(request)
        # Blocks that came free by force are for those who lacked them.
        if not starved and preemptions == self._counts.preemptions:
            budget = self._admit(budget, plan)
        if not plan.requests:
            return None

        copies = self.cache.checkpoints.take_copies()
        step = Step(
            self._counts.steps,
            *self._lists.of(plan, num_decodes, self._verified),
            num_decodes,
            self.max_num_batched_tokens - budget,
            plan.admitted,
            plan.edits,
            self._roster.take_released(),
            [copy for copy, _ in copies],
            self._drafted,
            self._rests,
        )
        checkpoints = [checkpoint for _, checkpoint in copies]
        self._outstanding.append(ScheduledStep(step, plan.requests, plan.starts, checkpoints))
        self._counts.steps += 1
        self._counts.decode_tokens += num_decodes
        self._counts.prefill_tokens += sum(plan.counts)
        return step

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
        reach = 1 + self.num_drafts + self._lookahead
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
        checkpoints = self.cache.checkpoints
        if checkpoints:
            for request in requests:
                computed = request.num_computed_tokens - width
                if self.num_drafts:
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
        known, checkpoints = request.num_known_tokens, self.cache.checkpoints
        end = checkpoints.chunk_end(request, start, min(known, start + budget), known)
        end = self.cache.grow(request, start, end)
        if end <= start:
            return 0  # an update will bring blocks
        # Not before: without a step nobody copies, and an update would offer what is not there.
        checkpoints.keep(request, start, known, replay=request.replay)
        request.replay = 0
        count, samples = end - start, end == known
        if samples and self._lookahead:  # drafts behind it that find no room do not count
            self.cache.grow(
                request, start, min(end + self._lookahead, request.max_total_tokens - 1)
            )
        plan.add_chunk(request, start, count, samples)
        request.num_computed_tokens = start + count
        request.num_pending += samples
        request.num_in_flight += 1
        return count

    def _admit(self, budget: int, plan: StepPlan) -> int:
        """Start waiting requests; returns what is left of the budget."""
        cache, roster, running = self.cache, self._roster, self._roster.running()
        waiting = roster.waiting
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
        while self.cache.grow(request, begin, end) < end:
            if self._roster.num_holding_blocks:
                return False  # an update will bring blocks; more victims might not be needed
            if self._roster.preempt_last("out of cache blocks") is request:
                return False
        return True

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
        oldest = self._outstanding[0]
        if len(sampled) != len(oldest.requests):
            raise ValueError(f"{len(sampled)} results for {len(oldest.requests)} requests")
        self._outstanding.popleft()
        return self._results.take(oldest, sampled, failed, spoilt)
