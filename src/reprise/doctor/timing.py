"""How long work takes on a device, by the platform's own events."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from reprise.platforms import Platform

ENOUGH_MS = 250.0
"""Work that has been timed for this long is not repeated further."""


def once_ms(platform: Platform, run: Callable[[], object]) -> float:
    """Milliseconds from the submission of ``run``'s work to its end."""
    began, ended = platform.event(timing=True), platform.event(timing=True)
    platform.synchronize()
    began.record(platform.current_stream())
    run()
    ended.record(platform.current_stream())
    ended.synchronize()
    return float(began.elapsed_time(ended))


def median_ms(platform: Platform, *runs: Callable[[], object], repeats: int = 5) -> list[float]:
    """The median time of each of ``runs``, which take turns, so that a busy machine slows all
    of them alike. The caller has run them before."""
    times: list[list[float]] = [[] for _ in runs]
    while len(times[0]) < repeats and sum(map(sum, times)) < ENOUGH_MS * len(runs):
        for run, taken in zip(runs, times, strict=True):
            taken.append(once_ms(platform, run))
    return [statistics.median(each) for each in times]
