"""How long work takes on a device, by the platform's own events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from reprise.platforms import Platform

ENOUGH_MS = 250.0
"""Work that has been timed for this long is not repeated further."""

MOST_TURNS = 5
AGREEING_TURNS = 3
"""Fewer turns than this agree by chance."""


def once_ms(platform: Platform, run: Callable[[], object]) -> float:
    """Milliseconds from the submission of ``run``'s work to its end."""
    began, ended = platform.event(timing=True), platform.event(timing=True)
    platform.synchronize()
    began.record(platform.current_stream())
    run()
    ended.record(platform.current_stream())
    ended.synchronize()
    return float(began.elapsed_time(ended))


def compare_ms(
    platform: Platform, one: Callable[[], object], other: Callable[[], object]
) -> tuple[float, float, bool]:
    """The median times of two runs that take turns, and whether every turn agrees on the faster.
    The caller has run both before."""
    ones, others = _turns_ms(platform, (one, other))
    longer = [a > b for a, b in zip(ones, others, strict=True)]
    sure = len(longer) >= AGREEING_TURNS and (all(longer) or not any(longer))
    return statistics.median(ones), statistics.median(others), sure


def median_ms(platform: Platform, run: Callable[[], object]) -> float:
    """The median time of ``run``, which the caller has run before."""
    (times,) = _turns_ms(platform, (run,))
    return statistics.median(times)


def _turns_ms(platform: Platform, runs: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Times of each of ``runs``, which take turns, so that a busy machine slows all of them
    alike."""
    times: list[list[float]] = [[] for _ in runs]
    while len(times[0]) < MOST_TURNS and sum(map(sum, times)) < ENOUGH_MS * len(runs):
        for run, taken in zip(runs, times, strict=True):
            taken.append(once_ms(platform, run))
    return times
