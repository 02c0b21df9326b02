"""Which clients are about to ask something: what says to the engine that a request is one of a
burst."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

SOON_SECONDS = 0.003
"""From a connection to its request, and from the beginning of a request to its end, of clients that
are as quick as this process. Others are waited for no longer: a connection may be opened long
before it is used."""
READ_SECONDS = 0.05
"""A whole request waits at most so long for those before it, if it is not forgotten."""


class Arrivals:
    """Requests of this process that are read, or will be in a moment, and are not asked yet.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._until: dict[Hashable, float] = {}

    def expect(self, who: Hashable, seconds: float) -> None:
        """One that is believed in for so long, unless it ends or is expected again."""
        self._until[who] = self._clock() + seconds

    def end(self, who: Hashable) -> None:
        """No request is to be expected of it: it has been sent, asks nothing of the engine, or its
        client is gone."""
        self._until.pop(who, None)

    def any(self) -> bool:
        """Whether another one is to come in a moment."""
        now = self._clock()
        while self._until:
            who = next(iter(self._until))
            if self._until[who] > now:
                return True
            del self._until[who]
        return False
