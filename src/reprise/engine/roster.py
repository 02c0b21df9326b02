"""Which requests wait, which run, and in which rows: the places of all unfinished requests."""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections.abc import Collection, Iterable
from heapq import heappop, heappush
from operator import attrgetter

from reprise.cache import CacheManager
from reprise.engine.scheduler_counts import SchedulerCounts
from reprise.engine.waiting_queue import WaitingQueue
from reprise.errors import RequestError
from reprise.request import FINISHED_STATUS, FinishReason, Request, RequestStatus
from reprise.step import NULL_ROW

logger = logging.getLogger(__name__)

_by_urgency = attrgetter("urgency")


class Roster:
    """Owns all unfinished requests. Each waits, without row and blocks, or runs, with both.

    A row never moves, and one that comes free may be given out at once, since the device computes
    steps in their order. Blocks of a request that runs no more come free when no scheduled step
    writes them any more: no two requests use a block in steps that are under way together.

    Args:
        cache: Gets blocks back.
        num_rows: Most requests that run.
        counts: Gets preemptions and ends.
    """

    def __init__(self, cache: CacheManager, num_rows: int, counts: SchedulerCounts) -> None:
        self._cache = cache
        self._num_rows = num_rows
        self._counts = counts
        self._forget_all()

    def _forget_all(self) -> None:
        self._requests: dict[str, Request] = {}
        """All that are not finished."""
        self.waiting = WaitingQueue()
        self._running: list[Request] = []
        """By urgency. May contain finished requests while ``_running_is_stale``."""
        self._running_is_stale = False
        self._free_rows = list(range(NULL_ROW + 1, NULL_ROW + 1 + self._num_rows))
        """A heap."""
        self._released: list[int] = []
        self.num_holding_blocks = 0
        """Requests that do not run any more but whose blocks a scheduled step writes."""

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: str) -> Request | None:
        """The unfinished request of this name."""
        return self._requests.get(request_id)

    def running(self) -> list[Request]:
        """Requests that run, the most urgent first; the list itself, which preemption shortens from
        its end."""
        if self._running_is_stale:
            self._running = [r for r in self._running if r.finish_reason is None]
            self._running_is_stale = False
        return self._running

    @property
    def num_running(self) -> int:
        """How many requests run, for any thread: it reads alone."""
        return sum(each.finish_reason is None for each in self._running)

    def take_released(self) -> list[int]:
        """Rows that came free since the last call."""
        released, self._released = self._released, []
        return released

    # ---- a request's way ---------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Have a new request wait.

        Raises:
            RequestError: Another unfinished one has the same id.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request_id={request.request_id!r}: a request with this id is running, give "
                "each a new one"
            )
        self._requests[request.request_id] = request
        self.waiting.push(request)

    def admit(self) -> Request:
        """Have the most urgent waiting request run, which has its blocks."""
        request = self.waiting.pop()
        request.status = RequestStatus.RUNNING
        insort(self._running, request, key=_by_urgency)
        request.row = heappop(self._free_rows)
        return request

    def preempt_last(self, reason: str) -> Request:
        """Have the least urgent running request wait again. Returns it."""
        request = self.running().pop()
        self._preempt(request, reason)
        return request

    def preempt(self, requests: Collection[Request], reason: str) -> None:
        """Have these running requests wait again, to be computed from their tokens."""
        victims = set(requests)
        self._running = [each for each in self.running() if each not in victims]
        for request in requests:
            self._preempt(request, reason)

    def _preempt(self, request: Request, reason: str) -> None:
        logger.debug("request %s is preempted: %s", request.request_id, reason)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._counts.preemptions += 1
        self._leave(request)
        self.waiting.push(request)

    def finish(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """End a request. If it has finished already, only its reason is replaced."""
        if request.finish_reason is not None:
            self._counts.finished[request.finish_reason] -= 1
            self._set_finished(request, reason, stop_reason)
            return
        was_running = request.status is RequestStatus.RUNNING
        self._set_finished(request, reason, stop_reason)
        request.finished_time = time.perf_counter()
        del self._requests[request.request_id]
        if was_running:
            self._running_is_stale = True
            self._leave(request)
        else:
            self.waiting.discard(request)

    def start_over(self) -> None:
        """Abort every request. Relies on nothing that may be half-changed."""
        for request in self._requests.values():
            if request.finish_reason is None:
                self._set_finished(request, "abort", None)
                request.finished_time = time.perf_counter()
        self._forget_all()

    def _set_finished(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None
    ) -> None:
        request.status = FINISHED_STATUS[reason]
        request.finish_reason = reason
        request.stop_reason = stop_reason
        self._counts.finished[reason] += 1

    # ---- steps that write its blocks ---------------------------------------------------------

    def _leave(self, request: Request) -> None:
        """The request runs no more: free its row, and its blocks now or when no step writes
        them."""
        self._released.append(request.row)
        heappush(self._free_rows, request.row)
        request.row = NULL_ROW
        if request.num_in_flight:
            self.num_holding_blocks += 1
        else:
            self._cache.free(request)

    def written_no_more(self, request: Request) -> None:
        """The last step was updated that wrote blocks of a request, which does not run any more."""
        if request.tables:  # kept for this step
            self._cache.free(request)
            self.num_holding_blocks -= 1

    def drop_steps(self, requests: Iterable[Request]) -> None:
        """Steps of these requests, all that are scheduled, will never be updated."""
        for request in dict.fromkeys(requests):
            request.num_in_flight = request.num_pending = 0
            if request.status is not RequestStatus.RUNNING:
                self.written_no_more(request)
