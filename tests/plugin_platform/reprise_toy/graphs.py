"""The toy device with graphs: recordings, in pools whose memory the device counts."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, ClassVar

import torch

from reprise.platforms import MemoryInfo
from reprise.platforms.cpu import cpp_compiler_missing
from reprise.platforms.device_graph import DeviceGraph
from reprise.platforms.recorded_graph import RecordedGraph, recording
from reprise.platforms.recorded_pool import RecordedPool
from reprise_toy.platform import MEMORY, ToyPlatform


class ToyGraph(RecordedGraph):
    """A recording; the device counts how often it was asked for one."""

    def __init__(self, platform: GraphToyPlatform, pool: RecordedPool) -> None:
        super().__init__(pool)
        self._platform = platform

    def _replay(self) -> None:
        self._platform.num_replays += 1
        super()._replay()


class GraphToyPlatform(ToyPlatform):
    name = "toy-graphs"
    graphs_by_default = True
    graph_memory = "measure"
    graph_memory_reason = "the device counts the pools of its graphs"
    default_batched_tokens = 32
    most_requests = 24
    preferred: ClassVar = {"*": ("torch", "reference")}

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.num_replays = 0
        self._pools: weakref.WeakSet[RecordedPool] = weakref.WeakSet()

    @property
    def has_graphs(self) -> bool:
        return True

    def compiler_missing(self) -> str | None:
        return cpp_compiler_missing()

    def graph_pool(self) -> RecordedPool:
        pool = RecordedPool()
        self._pools.add(pool)
        return pool

    def graph_pool_memory(self, pool: RecordedPool) -> list[torch.Tensor]:
        return pool.memory()

    def capture_stream(self) -> contextlib.AbstractContextManager[Any]:
        return recording()

    def new_graph(self, pool: Any = None) -> DeviceGraph:
        return ToyGraph(self, self.graph_pool() if pool is None else pool)

    def memory_info(self) -> MemoryInfo:
        taken = sum(each.nbytes for each in self._pools)
        return MemoryInfo(free=MEMORY - taken, total=MEMORY)
