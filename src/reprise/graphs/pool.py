"""Memory that graphs of all owners share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reprise.graphs.segments import SegmentedGraph
from reprise.platforms import Platform


class GraphPool:
    """What graphs need while they run, and nothing that outlives a run: graphs of several runners
    may share it if they never run at the same time. Inputs, outputs and state lie elsewhere.

    Args:
        platform: The device.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._handle: Any = None
        self._kept: dict[int, SegmentedGraph] = {}
        """One graph of each pool, kept whatever its verdict: a pool dies with its last graph."""
        self._memory: dict[int, list[Tensor]] = {}

    def prepare(self) -> None:
        """The next capture will have a pool, which grows by it."""
        self._memory.clear()
        if self._handle is None:
            self._handle = self._platform.graph_pool()

    @property
    def handle(self) -> Any:
        """The platform's; :meth:`prepare` comes first."""
        return self._handle

    def keep(self, graph: SegmentedGraph) -> None:
        """Take in a graph that was captured; its memory is there as long as this is."""
        self._kept.setdefault(id(graph.pool), graph)

    def spoiled(self) -> None:
        """A capture failed, and what it has left is unknown: the next one takes another pool."""
        self._handle = None

    def memory(self, graph: SegmentedGraph) -> list[Tensor]:
        """All memory of the pool of a graph, to be overwritten."""
        if id(graph.pool) not in self._memory:
            self._memory[id(graph.pool)] = self._platform.graph_pool_memory(graph.pool)
        return self._memory[id(graph.pool)]

    def discard(self) -> None:
        """Throw all graphs away: begin anew."""
        self._handle = None
        self._kept.clear()
        self._memory.clear()
