"""What there is to know about an engine at one moment, and about several together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reprise.engine.draft_counts import DraftStats
from reprise.engine.scheduler_counts import SchedulerStats


@dataclass(frozen=True)
class EngineStats:
    """Everything there is to know about the engine's state at one moment."""

    scheduler: SchedulerStats
    num_requests: int
    """Callers' requests that are not finished."""
    startup_seconds: float
    drafts: DraftStats
    """Of drafted tokens, how many counted."""
    replicas: tuple[EngineStats, ...] = ()
    """Of each engine, where there are several; all else is their sum, and the longest start-up."""


def stats_of_all(found: Sequence[EngineStats]) -> EngineStats:
    """Sums over engines, and the longest start-up."""
    schedulers = [each.scheduler for each in found]
    drafts = [each.drafts for each in found]
    return EngineStats(
        scheduler=_sum(schedulers),
        num_requests=sum(each.num_requests for each in found),
        startup_seconds=max(each.startup_seconds for each in found),
        drafts=DraftStats(
            sum(each.drafts for each in drafts),
            sum(each.drafted for each in drafts),
            tuple(map(sum, zip(*(each.accepted_at for each in drafts), strict=True))),
        ),
        replicas=tuple(found),
    )


def _sum(found: Sequence[SchedulerStats]) -> SchedulerStats:
    values: dict[str, Any] = {}
    for each in dataclasses.fields(SchedulerStats):
        of_all = [getattr(stats, each.name) for stats in found]
        if isinstance(of_all[0], dict):
            values[each.name] = {key: sum(one[key] for one in of_all) for key in of_all[0]}
        else:
            values[each.name] = sum(of_all)
    values["cache_usage"] = values["num_blocks_used"] / max(1, values["num_blocks"])
    return SchedulerStats(**values)
