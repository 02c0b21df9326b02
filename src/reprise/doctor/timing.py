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


def median_ms(platform: Platform, run: Callable[[], object], repeats: int = 5) -> float:
    """Median of a few runs; the caller has run it before."""
    times: list[float] = []
    while len(times) < repeats and (not times or sum(times) < ENOUGH_MS):
        times.append(once_ms(platform, run))
    return statistics.median(times)
