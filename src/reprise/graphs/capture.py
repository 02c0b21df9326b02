"""Start-up of a graph runner: capture every bucket, prove each graph, fall back where it fails."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reprise.errors import describe
from reprise.graphs.compare import Difference, same_bits
from reprise.graphs.compiled import compile_model
from reprise.graphs.computation import Computation, Probe
from reprise.graphs.locate import Location, locate
from reprise.graphs.plan import FALLBACK, Executor
from reprise.graphs.report import GraphInfo
from reprise.graphs.segments import SegmentedGraph
from reprise.graphs.shape import StepShape
from reprise.graphs.verify import check_probe
from reprise.ops.registry import intercept
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

Agree = Callable[[bool], bool]
"""True if all ranks say True. Called in the same order on each rank."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, parts done, parts in all."""

VERIFY_SHARE = 0.25
VERIFY_SECONDS = 1.5
"""Verification may take this share of capture time, or so many seconds if that is longer. Every
graph gets its first probe in any case."""
LOCATE_AT_MOST = 2
"""Graphs of one phase and executor whose fault is traced to its op; the rest fail alike."""
WARN_AT_MOST = 3


@dataclass
class Cell:
    """One bucket of one phase, and the graph that runs it, if any."""

    shape: StepShape
    info: GraphInfo
    graph: SegmentedGraph | None = None
    probes: list[Probe] = field(default_factory=list)


class Capturer:
    """Captures and verifies the cells of one computation."""

    def __init__(
        self, computation: Computation, platform: Platform, agree: Agree, *, exact: bool
    ) -> None:
        self._computation = computation
        self._platform = platform
        self._agree = agree
        self._exact = exact
        self._pool: Any = None
        self._memory: dict[int, list[Tensor]] = {}
        self._anchors: dict[int, SegmentedGraph] = {}
        """One graph of each pool, kept whatever its verdict: a pool dies with its last graph."""
        self._compiled: Callable[..., Any] | None = None
        self._located: dict[tuple[str, Executor], int] = {}
        self._logged: Counter[tuple[str, Executor]] = Counter()

    def model(self, executor: Executor) -> Callable[..., Any]:
        """What ``forward`` is to call for an executor."""
        if executor != "compiled":
            return self._computation.model
        if self._compiled is None:
            self._compiled = compile_model(self._computation.model)
        return self._compiled

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """The conditions of every capture: no gradients, the op table, no garbage collection."""
        gc.collect()
        gc.freeze()
        try:
            with torch.inference_mode(), self._computation.ops.activate():
                yield
        finally:
            gc.unfreeze()

    def empty_inputs(self, shape: StepShape) -> None:
        """Fill the inputs with what graphs are captured on: padding alone."""
        self._computation.pad(shape.empty, shape)

    # ---- capture -------------------------------------------------------------------------

    def capture(self, cell: Cell, executor: Executor) -> None:
        """Give the cell a graph; if it cannot be captured, the next executor, down to eager."""
        started = time.perf_counter()
        info = cell.info
        while executor != "none":
            reason = self._try(cell, executor)
            if reason is None:
                break
            self.quarantine(cell, executor, reason)
            executor = FALLBACK[executor]
        info.executor = executor
        info.capture_seconds += time.perf_counter() - started

    def _try(self, cell: Cell, executor: Executor) -> str | None:
        """Capture; returns why it failed, here or on another rank.

        A vote follows each stage: a rank that failed says no before the others begin a pass over
        the model, in whose collectives they would wait for it.
        """
        self._memory.clear()
        for stage in (self._prepare, self._warm_up, self._record):
            reason = None
            try:
                stage(cell, executor)
            except Exception as error:
                # What a failed capture leaves in the pool is unknown; take another one.
                self._pool = None
                reason = f"capture failed: {describe(error)}"
            if not self._agree(reason is None):
                return reason or "capture failed on another rank"
        return None

    def _prepare(self, cell: Cell, executor: Executor) -> None:
        """All that a rank does alone."""
        self.model(executor)
        if self._pool is None:
            self._pool = self._platform.graph_pool()
        self.empty_inputs(cell.shape)

    def _warm_up(self, cell: Cell, executor: Executor) -> None:
        """Compile and tune kernels, and allocate workspaces, outside of the capture."""
        with self._platform.capture_stream(), intercept(None):
            self._computation.forward(cell.shape, self.model(executor))

    def _record(self, cell: Cell, executor: Executor) -> None:
        graph = SegmentedGraph(self._platform, self._pool)
        graph.capture(
            lambda: self._computation.forward(cell.shape, self.model(executor)),
            "nowhere" if executor == "full" else "breaks",
        )
        self._anchors.setdefault(id(graph.pool), graph)
        cell.graph = graph
        cell.info.segments, cell.info.breaks = graph.num_segments, graph.num_breaks
        cell.info.bytes = graph.nbytes

    def quarantine(self, cell: Cell, executor: Executor, reason: str) -> None:
        """The cell's graph is never replayed again."""
        cell.graph = None
        info = cell.info
        info.verified, info.segments, info.breaks, info.bytes = False, 0, 0, 0
        info.executor = "none"
        earlier = "" if info.quarantined is None else f"{info.quarantined}; then "
        info.quarantined = f"{earlier}{executor}: {reason}"
        # One cause usually fails many buckets alike; the report has them all.
        self._logged[info.phase, executor] += 1
        times = self._logged[info.phase, executor]
        if times <= WARN_AT_MOST:
            logger.warning("graph %s quarantined (%s): %s", cell.shape, executor, reason)
        if times == WARN_AT_MOST:
            logger.warning("further %s graphs (%s) fail silently", info.phase, executor)

    # ---- verification --------------------------------------------------------------------

    def verify(self, cells: list[Cell], capture_seconds: float, progress: Progress | None) -> None:
        """Probe each graph; a graph that fails is replaced by its fallback and probed again."""
        started = time.perf_counter()
        budget = max(VERIFY_SECONDS, VERIFY_SHARE * capture_seconds)
        for done, cell in enumerate(cells):
            cell.probes = list(self._computation.probes(cell.shape))
            self._verify(cell, 0)
            if progress is not None:
                progress("verify graphs", done + 1, len(cells))
        for number in range(1, max((len(each.probes) for each in cells), default=0)):
            for cell in cells:
                spent = time.perf_counter() - started
                if not self._agree(spent < budget):
                    return
                if number < len(cell.probes):
                    self._verify(cell, number)

    def _verify(self, cell: Cell, number: int) -> None:
        started = time.perf_counter()
        while cell.graph is not None:
            # A fallback has to pass the earlier probes too.
            failed = None
            for each in range(cell.info.probes, number + 1):
                failed = self._probe(cell, cell.probes[each])
                if failed is not None:
                    break
                cell.info.probes += 1
            if failed is None:
                cell.info.verified = True
                break
            executor = cell.info.executor
            self.quarantine(cell, executor, failed)
            cell.info.probes = 0
            self.capture(cell, FALLBACK[executor])
        cell.info.verify_seconds += time.perf_counter() - started

    def _probe(self, cell: Cell, probe: Probe) -> str | None:
        """Why the cell's graph is wrong on the probe; None: it is right."""
        assert cell.graph is not None
        pool = cell.graph.pool
        found: Difference | str | None = None
        try:
            if id(pool) not in self._memory:
                self._memory[id(pool)] = self._platform.graph_pool_memory(pool)
            probe.fill()
        except Exception as error:
            found = describe(error)
        if not self._agree(found is None):
            return f"probe {probe.name!r} cannot be made: {found or 'on another rank'}"
        model = self.model(cell.info.executor)
        try:
            found = check_probe(
                self._computation, cell.graph, cell.shape, probe.live, model,
                self._memory[id(pool)], exact=self._exact,
            )  # fmt: skip
        except Exception as error:
            found = describe(error)
        if self._agree(found is None):
            return None
        where = ""
        key = (cell.shape.phase, cell.info.executor)
        if self._located.get(key, 0) < LOCATE_AT_MOST:
            self._located[key] = self._located.get(key, 0) + 1
            where = self.where(cell, probe.live, probe.fill)
        return f"probe {probe.name!r}: {found or 'wrong on another rank'}{where}"

    def where(self, cell: Cell, live: StepShape, fill: Callable[[], None]) -> str:
        """``; first diverging op: ...`` of a graph that is wrong on what ``fill`` writes."""
        try:
            location = self.locate(cell, live, fill)
        except Exception as error:
            # The graph is wrong all the same, and is to be refused.
            return f"; not traced to an op: {describe(error)}"
        return "" if location is None else f"; {location}"

    def locate(self, cell: Cell, live: StepShape, fill: Callable[[], None]) -> Location | None:
        """Where the cell's graph diverges on what ``fill`` writes; raises what the search does."""
        return locate(
            self._computation, self._platform, cell.shape, live, fill,
            lambda: self.empty_inputs(cell.shape), cell.graph, self.model(cell.info.executor),
            self._agree,
        )  # fmt: skip

    def blind_inputs(self, cells: list[Cell]) -> list[str]:
        """Inputs to which no probe of the phase's first graph gives a new value."""
        blind: list[str] = []
        phases: set[str] = set()
        for cell in cells:
            if cell.shape.phase in phases or cell.graph is None:
                continue
            phases.add(cell.shape.phase)
            self.empty_inputs(cell.shape)
            inputs = self._computation.inputs(cell.shape)
            before = {name: each.clone() for name, each in inputs.items()}
            unchanged = set(before)
            for probe in cell.probes:
                with contextlib.suppress(Exception):  # one that time did not allow before
                    probe.fill()
                unchanged -= {n for n in unchanged if not same_bits(before[n], inputs[n])}
            blind += [f"{cell.shape.phase}: {name}" for name in before if name in unchanged]
        if blind:
            logger.warning("graph probes change no value of: %s", ", ".join(blind))
        return blind
