"""Takes what a step has sampled: tokens go to their requests, which go on from there or end.

What turns out superfluous, because its request had stopped, is dropped here; so is what a request
was reckoned to get and did not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence

from reprise.cache import CacheManager
from reprise.engine.roster import Roster
from reprise.engine.scheduler_counts import SchedulerCounts
from reprise.engine.step_plan import ScheduledStep
from reprise.request import Request, RequestStatus

logger = logging.getLogger(__name__)


class StepResults:
    """Knows what tokens do to their requests, and which of these end by them.

    Args:
        cache: Is told what has been computed.
        roster: Is told which requests end.
        counts: Gets the tokens.
        verifies: Decodes verify drafts.
    """

    def __init__(
        self, cache: CacheManager, roster: Roster, counts: SchedulerCounts, *, verifies: bool
    ) -> None:
        self._cache, self._roster, self._counts = cache, roster, counts
        self._verifies = verifies

    def take(
        self,
        scheduled: ScheduledStep,
        sampled: Sequence[Sequence[int]],
        failed: Collection[int],
        spoilt: Collection[int],
    ) -> list[Request]:
        """See :meth:`reprise.engine.scheduler.Scheduler.update`, of the oldest step."""
        step, requests, starts = scheduled.step, scheduled.requests, scheduled.starts
        for number, checkpoint in enumerate(scheduled.checkpoints):
            if checkpoint is not None:
                checkpoint.sound = number not in spoilt
        # A hot loop of a serving engine: attribute access is what costs.
        cache, verifies = self._cache, self._verifies
        now, running = time.perf_counter(), RequestStatus.RUNNING
        num_decodes = step.num_decodes
        width = 1 + step.drafts[0] if num_decodes else 1
        updated: list[Request] = []
        generated = 0
        for number in failed:
            request = requests[number]
            if request.finish_reason is None:
                cache.forget(request)
                self._roster.finish(request, "error")
                updated.append(request)
        for number, (request, tokens) in enumerate(zip(requests, sampled, strict=True)):
            request.num_in_flight -= 1
            if request.finish_reason is None:
                known, last = request.token_ids, None
                had = len(known)
                if number < num_decodes:
                    computed = had + len(tokens) - 1
                    request.num_pending -= 1
                    if verifies:
                        request.state_begin = had - 1
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
                    cache.commit(request, computed)
                if last is not None:
                    self._finish_at(request, last)
            else:
                request.state_begin = -1  # this step has run over it
            if request.status is not running and not request.num_in_flight:
                self._roster.written_no_more(request)
        self._counts.generated_tokens += generated
        return updated

    def _finish_at(self, request: Request, token: int) -> None:
        """End the request, whose last token this is."""
        length = len(request.token_ids)
        long_enough = len(request.output_token_ids) >= request.params.min_tokens
        if token in request.stop_token_ids and long_enough:
            stop_reason = None if token in request.eos_token_ids else token
            self._roster.finish(request, "stop", stop_reason)
            return
        if length > self._cache.capacity:
            logger.warning(
                "request %s ends at %d tokens: it fills the whole cache",
                request.request_id,
                length,
            )
        self._roster.finish(request, "length")
