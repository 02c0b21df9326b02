"""When a live step is compared with eager execution."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence

from reprise.graphs.capture import BucketGraph
from reprise.graphs.verify_mode import VerifyMode

logger = logging.getLogger(__name__)

BACKGROUND_SHARE = 0.004
"""Of the time of replays, for canaries of steps that are trusted already."""
UNPROVEN_SHARE = 0.005
WINDOW_SECONDS = 60.0
"""Canaries of unproven kinds may take that share of the last so many seconds; together with those
above they cost less than 1 %."""


class CanaryPolicy:
    """Chooses canaries, for each graph by itself, without a rhythm that a fault could share.

    The number of replays to the next canary is drawn anew each time (geometric, so that no replay
    is safer than another), from a generator that is seeded by the graph's name.

    Args:
        mode: How many.
        seed: Of the draws.
        clock: Seconds.
    """

    def __init__(
        self, mode: VerifyMode, seed: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._mode = mode
        self.checks_kinds = mode.startup
        """Whether steps of unproven kinds may not be replayed unseen."""
        self.checks_everything = mode.canary == 1
        """Whether each replay is compared, and all memory with it."""
        self._seed = seed
        self._clock = clock
        self._left: dict[object, int] = {}
        self._eager_next: set[object] = set()
        """Graphs whose last canary was replayed first."""
        self._random: dict[object, random.Random] = {}
        self._spent: deque[tuple[float, float]] = deque()
        self._lost: dict[object, float] = {}

    def is_due(self, bucket: BucketGraph) -> bool:
        """Count a replay; whether it is to be compared."""
        if self.checks_everything:
            return True
        left = self._left.get(bucket.key)
        if left is None:
            every = self.every(bucket)
            if every is None:
                return False
            left = self._draw(bucket, every)
        self._left[bucket.key] = left - 1
        if left > 1:
            return False
        del self._left[bucket.key]
        return True

    def replays_first(self, bucket: BucketGraph) -> bool:
        """Count a canary of a trusted kind; whether its replay comes before eager execution: of
        every other one of a graph, and of the first behind :meth:`hurry`."""
        if bucket.key in self._eager_next:
            self._eager_next.remove(bucket.key)
            return False
        self._eager_next.add(bucket.key)
        return True

    def every(self, bucket: BucketGraph) -> int | None:
        """One in so many replays of the graph is to be compared, on average; None: none."""
        if self._mode.canary:
            return self._mode.canary
        info = bucket.info
        if not self._mode.background or not info.replay_seconds:
            return None
        return max(2, math.ceil(info.check_seconds / (BACKGROUND_SHARE * info.replay_seconds)))

    def hurry(self, buckets: Sequence[BucketGraph]) -> None:
        """Compare the next replay of each."""
        for bucket in buckets:
            self._left[bucket.key] = 1
            self._eager_next.discard(bucket.key)

    def may_meet(self, bucket: BucketGraph) -> bool:
        """Whether a canary of an unproven kind can be afforded now, or costs no more than the
        steps of the graph that ran eagerly for want of one have lost already: so that both cost at
        most twice what the better one would."""
        limit = self._clock() - WINDOW_SECONDS
        while self._spent and self._spent[0][0] < limit:
            self._spent.popleft()
        if sum(each for _, each in self._spent) < UNPROVEN_SHARE * WINDOW_SECONDS:
            return True
        return 0 < _extra(bucket, bucket.info.check_seconds) <= self._lost.get(bucket.key, 0.0)

    def put_off(self, bucket: BucketGraph) -> None:
        """A step of an unproven kind runs eagerly, since a canary cannot be afforded."""
        lost = max(0.0, bucket.info.eager_seconds - bucket.info.replay_seconds)
        self._lost[bucket.key] = self._lost.get(bucket.key, 0.0) + lost

    def met(self, bucket: BucketGraph, seconds: float) -> None:
        """A canary of an unproven kind took so long. The step would have run eagerly otherwise:
        what counts is what comes on top."""
        self._lost.pop(bucket.key, None)
        self._spent.append((self._clock(), _extra(bucket, seconds)))

    def announce(self, buckets: Sequence[BucketGraph]) -> None:
        """Log how soon a graph that goes wrong is found."""
        chosen = {each.info.name: every for each in buckets if (every := self.every(each))}
        if not self._mode.background or not chosen:
            return
        graphs = [each for each in buckets if each.info.name in chosen]
        often = min(graphs, key=lambda each: chosen[each.info.name])
        seldom = max(graphs, key=lambda each: chosen[each.info.name])
        logger.info(
            "graphs: live canaries take at most %.1f %% of the time: one in %d replays of %s to "
            "one in %d of %s; a graph that goes wrong is found after %d to %d tokens on average",
            100 * (BACKGROUND_SHARE + UNPROVEN_SHARE),
            chosen[often.info.name], often.info.name, chosen[seldom.info.name], seldom.info.name,
            min(chosen[each.info.name] * each.shape.num_requests for each in graphs),
            max(chosen[each.info.name] * each.shape.num_requests for each in graphs),
        )  # fmt: skip

    def _draw(self, bucket: BucketGraph, every: int) -> int:
        generator = self._random.get(bucket.key)
        if generator is None:
            generator = self._random[bucket.key] = random.Random(f"{self._seed} {bucket.key}")
        # The inverse of the geometric distribution with mean ``every``.
        uniform = 1.0 - generator.random()
        return 1 + int(math.log(uniform) / math.log1p(-1.0 / every))


def _extra(bucket: BucketGraph, seconds: float) -> float:
    """What a canary of so many seconds costs above eager execution."""
    return max(seconds - bucket.info.eager_seconds, seconds / 4)
