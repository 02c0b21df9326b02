"""Where the time of one step goes: segments and breaks of a graph, ops of an eager step."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from reprise.doctor.graphs.places import Places
from reprise.doctor.graphs.report import Bar
from reprise.graphs import Segment, SegmentedGraph
from reprise.ops.registry import Op, intercept
from reprise.platforms import Platform

REPEATS = 5


def graph_bars(platform: Platform, graph: SegmentedGraph, places: Places) -> list[Bar]:
    """The steps of a replay, each with its median time."""
    walks = [_walk(platform, graph) for _ in range(REPEATS)]
    bars = []
    segments = 0
    for step, *times in zip(graph.steps, *walks, strict=True):
        ms = statistics.median(times)
        if isinstance(step, Segment):
            ops = [_named(str(call), places) for call in step.calls]
            bars.append(Bar("graph", f"segment {segments}", ms, ops=ops))
            segments += 1
        else:
            bars.append(Bar("break", str(step.call), ms, module=places.module(str(step.call))))
    return bars


def eager_bars(platform: Platform, forward: Callable[[], Any], places: Places) -> list[Bar]:
    """The ops of an eager step and what lies between them, each with its median time."""
    walks = [_walk_eagerly(platform, forward) for _ in range(REPEATS)]
    bars = []
    for parts in zip(*walks, strict=True):
        name = parts[0][0]
        ms = statistics.median(each[1] for each in parts)
        if name is None:
            bars.append(Bar("rest", "between ops", ms))
        else:
            bars.append(Bar("op", name, ms, module=places.module(name)))
    return bars


def _walk(platform: Platform, graph: SegmentedGraph) -> list[float]:
    events = [platform.event(timing=True) for _ in range(len(graph.steps) + 1)]
    platform.synchronize()
    events[0].record(platform.current_stream())
    for step, event in zip(graph.steps, events[1:], strict=True):
        step.run()
        event.record(platform.current_stream())
    return _gaps(platform, events)


def _walk_eagerly(platform: Platform, forward: Callable[[], Any]) -> list[tuple[str | None, float]]:
    names: list[str | None] = []
    events = []
    counts: Counter[str] = Counter()

    def mark() -> None:
        events.append(platform.event(timing=True))
        events[-1].record(platform.current_stream())

    def note(
        op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        mark()
        result = function(*args, **kwargs)
        mark()
        names.extend((None, f"{op.name} #{counts[op.name]}"))
        counts[op.name] += 1
        return result

    platform.synchronize()
    mark()
    with intercept(note):
        forward()
    mark()
    names.append(None)
    return list(zip(names, _gaps(platform, events), strict=True))


def _gaps(platform: Platform, events: Sequence[Any]) -> list[float]:
    platform.synchronize()
    return [float(begin.elapsed_time(end)) for begin, end in itertools.pairwise(events)]


def _named(call: str, places: Places) -> str:
    module = places.module(call)
    return f"{call} ({module})" if module else call
