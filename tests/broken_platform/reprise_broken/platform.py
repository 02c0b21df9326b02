"""Platforms that are right but for one thing. The class says which contract notices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from reprise.errors import GraphError
from reprise.platforms.cpu import CpuPlatform
from reprise.platforms.device_graph import DeviceGraph
from reprise.platforms.host_queue import HostEvent
from reprise.platforms.recorded_graph import RecordedGraph
from reprise.platforms.recorded_pool import RecordedPool


class Broken(CpuPlatform):
    priority = -1
    notices: str
    """The contract that this platform breaks."""


class StaleGraphs(Broken):
    """A replay computes from copies of its inputs that were made at capture."""

    name = "stale-graphs"
    notices = "graphs_replay_fresh_inputs"

    def new_graph(self, pool: Any = None) -> DeviceGraph:
        return _CopyingGraph(RecordedPool() if pool is None else pool)


class _CopyingGraph(RecordedGraph):
    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        schema = getattr(function, "_schema", None)
        if schema is not None:
            args = tuple(
                value if _writes(schema, place) else tree_map_only(Tensor, self._copy, value)
                for place, value in enumerate(args)
            )
        return super()._call(function, args, kwargs)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor if self.may_own(tensor) else tensor.clone()


def _writes(schema: Any, place: int) -> bool:
    alias = schema.arguments[place].alias_info
    return alias is not None and alias.is_write


class OwnPools(Broken):
    """Every graph takes memory of its own, whatever pool it is given."""

    name = "own-pools"
    notices = "graphs_share_a_pool"

    def new_graph(self, pool: Any = None) -> DeviceGraph:
        return super().new_graph(None)


class CarelessCapture(Broken):
    """Reading a device value during capture gives an empty graph instead of an error."""

    name = "careless-capture"
    notices = "graphs_refuse_host_reads"

    def new_graph(self, pool: Any = None) -> DeviceGraph:
        return _CarelessGraph(RecordedPool() if pool is None else pool)


class _CarelessGraph(RecordedGraph):
    def capture(self, function: Callable[[], Any]) -> Any:
        try:
            return super().capture(function)
        except GraphError:
            self._captured = True
            return None


class StoppedClock(Broken):
    """All work takes one millisecond."""

    name = "stopped-clock"
    notices = "events_time_work"

    def event(self, *, timing: bool = False) -> Any:
        return _StoppedEvent()


class _StoppedEvent(HostEvent):
    def elapsed_time(self, end: HostEvent) -> float:
        return 1.0


class HastyEvents(Broken):
    """Work on a side stream is done late, and events do not wait for it."""

    name = "hasty-events"
    notices = "events_order_work"

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self._late: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def use_stream(self, stream: Any) -> Iterator[Any]:
        with _Late(self._late):
            yield stream

    def stream(self) -> Any:
        return _WaitedStream(self._late)

    def current_stream(self) -> Any:
        return _WaitedStream(self._late)

    def synchronize(self) -> None:
        _finish(self._late)


class _WaitedStream:
    """Waiting for a stream is right here; it is the events that are not."""

    def __init__(self, late: list[tuple[Tensor, Tensor]]) -> None:
        self._late = late

    def wait_stream(self, other: Any) -> None:
        _finish(self._late)

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        _finish(self._late)


class _Late(torch.utils._python_dispatch.TorchDispatchMode):
    """Puts what is written in place aside until somebody finishes it."""

    def __init__(self, late: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._late = late

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        before = args[0].clone()
        result = func(*args, **(kwargs or {}))
        self._late.append((args[0], args[0].clone()))
        args[0].copy_(before)
        return result


def _finish(late: list[tuple[Tensor, Tensor]]) -> None:
    for target, value in late:
        target.copy_(value)
    late.clear()


class StillCounters(Broken):
    """Says that it counts memory, and reports the same number for ever."""

    name = "still-counters"
    notices = "memory_counters_follow_tensors"
    counts_memory = True

    def memory_allocated(self) -> int:
        return 1 << 20


class GreedyCache(Broken):
    """Gives the cache all memory, whatever the largest step needs."""

    name = "greedy-cache"
    notices = "memory_has_sane_limits"

    def cache_budget(self, utilization: float, activation_bytes: int) -> int:
        return self.memory_info().free
