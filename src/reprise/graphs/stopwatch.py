"""How long a step takes, by eager execution and by replay."""

from __future__ import annotations

import time
from typing import NamedTuple

from reprise.platforms import Platform


class Times(NamedTuple):
    """How long a step takes both ways, in seconds."""

    eager: float
    replay: float
    submitting: float
    """The host's part of eager execution."""


class Stopwatch:
    """Times the work of a ``with`` block without waiting for it."""

    def __init__(self, platform: Platform) -> None:
        self._begin, self._end = platform.event(timing=True), platform.event(timing=True)
        self.host = 0.0
        """Seconds in which it was submitted."""

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        self._begin.record()

    def __exit__(self, *error: object) -> None:
        self._end.record()
        self.host = time.perf_counter() - self._began

    def seconds(self) -> float:
        """What it would have taken alone: submitting it, or computing it, whichever is longer. The
        device may have been behind when it was submitted."""
        return max(self.host, float(self._begin.elapsed_time(self._end)) / 1e3)
