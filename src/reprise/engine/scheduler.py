"""Requests come, are computed step by step, and go.

One step ahead: ``schedule`` may be called before the step before has been updated. A decode then
takes a token whose value only the device knows yet, and where drafts are verified the device alone
knows how many tokens there are: the scheduler reckons with the most that there can be, and is
corrected in ``update``.

What a step computes is planned in ``step_planner.py``; who has which row and which blocks is the
roster's to know (``roster.py``); what a step's tokens do to their requests is told in
``step_results.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from reprise.cache import CacheManager
from reprise.engine.prompt import check_fits
from reprise.engine.roster import Roster
from reprise.engine.scheduler_counts import SchedulerCounts, SchedulerStats
from reprise.engine.step_plan import ScheduledStep
from reprise.engine.step_planner import StepPlanner
from reprise.engine.step_results import StepResults
from reprise.errors import ConfigError
from reprise.request import FinishReason, Request
from reprise.step import Step

RESERVE_FRACTION = 0.01
"""Part of the cache that is kept free at admission for running requests, lest they be preempted
soon."""


class Scheduler:
    """Has steps planned and takes their tokens. Not thread-safe: one loop calls it.

    Args:
        cache: Where requests get their blocks; used by no other thread.
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
            reserve = cache.reserve(RESERVE_FRACTION, max_num_batched_tokens)
        else:
            reserve = [reserve_blocks] * len(cache.pools)
        self.num_drafts = num_drafts
        self._counts = SchedulerCounts()
        self._roster = Roster(cache, max_num_seqs, self._counts)
        self.planner = StepPlanner(
            cache, self._roster, self._counts, max_requests=max_num_seqs,
            max_tokens=max_num_batched_tokens, reserve=reserve, num_drafts=num_drafts,
            lookahead=lookahead, blocks_ahead=blocks_ahead, drafting=drafting, resting=resting,
        )  # fmt: skip
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
        """Tokens of all requests, from the start."""
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

    # ------------------------------------------------------------------ steps

    def schedule(self) -> Step | None:
        """The next step, or None if nothing can be computed now: there is no work, or outstanding
        steps must be updated first."""
        scheduled = self.planner.next_step()
        if scheduled is None:
            return None
        self._outstanding.append(scheduled)
        return scheduled.step

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
                No other request shares what was computed of them.
            spoilt: Numbers of the step's copies of states that were no finite numbers: what they
                make is shown to no caller.

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
