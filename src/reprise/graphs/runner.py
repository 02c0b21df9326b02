"""The one entry through which a model runs: replay where a proven graph fits, eager elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from reprise import timeline
from reprise.errors import GraphReplayError, describe
from reprise.graphs.buckets import Buckets
from reprise.graphs.capture import Agree, Capturer, Cell, Progress
from reprise.graphs.computation import Computation
from reprise.graphs.plan import Executor, GraphPlan, ResolvedPlan, resolve, support_of
from reprise.graphs.report import GraphInfo, GraphMemory, GraphReport
from reprise.graphs.shape import PHASES, Phase, StepShape
from reprise.graphs.state import StepState
from reprise.graphs.verify import VerifyMode, check_live
from reprise.ops.registry import Op, OpTable, intercept
from reprise.platforms import Platform

logger = logging.getLogger(__name__)


def ops_used(table: OpTable, forward: Callable[[], Any]) -> list[Op]:
    """The ops that ``forward`` calls, found by calling it."""
    used: dict[str, Op] = {}

    def note(op: Op, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        used[op.name] = op
        return function(*args, **kwargs)

    with torch.inference_mode(), table.activate(), intercept(note):
        forward()
    return list(used.values())


class GraphRunner:
    """Owns the graphs of one computation. A target model and a draft model each have one.

    Args:
        computation: What to run; knows model, buffers and state.
        platform: Where.
        plan: The executors asked for.
        buckets: The sizes to capture.
        max_requests: Most requests in a step.
        verify: When to compare graphs with eager execution.
        query_lens: New tokens of a request in decode steps; one set of decode graphs for each.
        agree: Collective AND over the ranks that compute together.
        used: The ops in the computation; found by a trial run if left out.
    """

    def __init__(
        self,
        computation: Computation,
        platform: Platform,
        plan: GraphPlan,
        buckets: Buckets,
        max_requests: int,
        *,
        verify: VerifyMode = VerifyMode(),  # noqa: B008 - frozen
        query_lens: Iterable[int] = (1,),
        agree: Agree = lambda ok: ok,
        used: Iterable[Op] | None = None,
    ) -> None:
        self.computation = computation
        self.platform = platform
        self.buckets = buckets
        self.requested = plan
        self.verify = verify
        self.memory = GraphMemory()
        self.predicted_bytes: dict[StepShape, int] = {}
        self._agree = agree
        self._query_lens = tuple(query_lens)
        self._max_requests = max_requests
        self.plan = self._resolve(used)
        self.capturer = Capturer(computation, platform, agree, exact=self._exact)
        self.cells: dict[tuple[Phase, int, int], Cell] = {}
        """By phase, query length and bucket."""
        self._seconds = [0.0, 0.0]
        self._eager_steps = 0
        self._replays = 0
        self._canaries = 0
        self.canary_failures = 0
        """Canaries that were wrong; replays before them may have been wrong too."""
        self._blind: list[str] = []

    def _resolve(self, used: Iterable[Op] | None) -> ResolvedPlan:
        shape = StepShape.decode(1)
        self._exact = True
        support = {}
        if self._may_capture():
            if used is None:
                used = ops_used(self.computation.ops, lambda: self._trial(shape))
            used = list(used)
            # One op that is allowed to vary makes all that follows it vary.
            self._exact = all(op.deterministic for op in used)
            support = support_of(self.computation.ops, used)
        return resolve(
            self.requested,
            self.platform,
            support,
            query_len=max(self._query_lens),
            compiler_reason=self.platform.compiler_missing(),
        )

    def _may_capture(self) -> bool:
        idle = ("none",) if self.platform.graphs_by_default else ("none", "auto")
        return any(self.requested.of(phase) not in idle for phase in PHASES)

    def _trial(self, shape: StepShape) -> None:
        self.computation.pad(shape.empty, shape)
        self.computation.forward(shape, self.computation.model)

    # ---- start-up ------------------------------------------------------------------------

    def shapes(self) -> list[StepShape]:
        """Every bucket that is to be captured, largest first."""
        found = []
        if self.plan.decode != "none":
            found += [
                StepShape.decode(size, query_len)
                for query_len in self._query_lens
                for size in self.buckets.decode
            ]
        if self.plan.mixed != "none":
            found += [
                StepShape.mixed(size, min(size, self._max_requests)) for size in self.buckets.mixed
            ]
        return sorted(found, key=lambda each: (-each.num_tokens, PHASES.index(each.phase)))

    def capture_all(self, progress: Progress | None = None) -> None:
        """Capture every bucket, then verify each graph. Never raises for a graph's sake.

        The computation's state is as before, its static inputs are not.
        """
        shapes = self.shapes()
        if not shapes:
            return
        free = self._free_memory()
        with self.capturer.ready():
            started = time.perf_counter()
            for done, shape in enumerate(shapes):
                self.capture(shape)
                if progress is not None:
                    progress("capture graphs", done + 1, len(shapes))
            self.platform.synchronize()
            self._seconds[0] = time.perf_counter() - started
            if free is not None and (left := self._free_memory()) is not None:
                self.memory.actual = max(0, free - left)
            if self.verify.startup:
                started = time.perf_counter()
                with timeline.phase("verify"):
                    cells = list(self.cells.values())
                    self.capturer.verify(cells, self._seconds[0], progress)
                    self._blind = self.capturer.blind_inputs(cells)
                self._seconds[1] = time.perf_counter() - started
        self._log_summary()

    def capture(self, shape: StepShape) -> Cell:
        """Capture one bucket with the plan's executor, or the next one that works."""
        planned = self.plan.of(shape.phase)
        info = GraphInfo(shape.phase, shape.size, shape.query_len, planned, planned)
        info.predicted_bytes = self.predicted_bytes.get(shape)
        cell = self.cells[shape.phase, shape.query_len, shape.size] = Cell(shape, info)
        self.capturer.capture(cell, planned)
        return cell

    def discard(self) -> None:
        """Forget all graphs and give their memory back."""
        self.cells.clear()
        self.capturer = Capturer(self.computation, self.platform, self._agree, exact=self._exact)
        try:
            self.platform.synchronize()
            self.platform.empty_cache()
        except Exception as error:  # if the device is lost, the next step says so
            logger.warning("graph memory: not given back (%s)", describe(error))

    def _free_memory(self) -> int | None:
        """Free bytes, for the report alone; None where they cannot be measured."""
        if self.platform.graph_memory != "measure":
            return None
        try:
            self.platform.synchronize()
            self.platform.empty_cache()
            return self.platform.memory_info().free
        except Exception as error:
            logger.warning("graph memory: not measured (%s)", describe(error))
            return None

    def _log_summary(self) -> None:
        infos = [each.info for each in self.cells.values()]
        running = [each for each in infos if each.executor != "none"]
        logger.info(
            "graphs: %s; %d captured in %.2f s, %d verified in %.2f s, %d quarantined, %.1f MiB",
            self.plan,
            len(running),
            self._seconds[0],
            sum(each.verified for each in infos),
            self._seconds[1],
            sum(each.quarantined is not None for each in infos),
            sum(each.bytes for each in infos) / 2**20,
        )

    # ---- steps ---------------------------------------------------------------------------

    def run(self, shape: StepShape) -> Tensor:
        """Compute one step; the static inputs hold its values.

        Returns:
            The first output's rows of this step, overwritten by the next one.
        """
        computation = self.computation
        with torch.inference_mode(), computation.ops.activate():
            cell = self._cell_for(shape)
            if cell is None or cell.graph is None:
                self._eager_steps += 1
                computation.forward(shape, computation.model)
            else:
                if shape != cell.shape:
                    computation.pad(shape, cell.shape)
                self._replays += 1
                cell.info.replays += 1
                every = self.verify.canary
                if every and self._replays % every == 0:
                    self._canary(cell, shape)
                else:
                    self._replay(cell)
        return next(iter(computation.outputs(shape).values()))

    def padded(self, shape: StepShape) -> StepShape:
        """What a step of this shape is padded to: its bucket, or nothing more if none holds it."""
        cell = self._cell_for(shape)
        return shape if cell is None or cell.graph is None else cell.shape

    def executor_for(self, shape: StepShape) -> Executor:
        """What would run a step of this shape."""
        cell = self._cell_for(shape)
        return "none" if cell is None or cell.graph is None else cell.info.executor

    def _cell_for(self, shape: StepShape) -> Cell | None:
        bucket = self.buckets.bucket_for(shape.phase, shape.size)
        if bucket is None:
            return None
        return self.cells.get((shape.phase, shape.query_len, bucket))

    def _replay(self, cell: Cell) -> None:
        assert cell.graph is not None
        try:
            cell.graph.replay()
        except Exception as error:
            reason = f"replay: {describe(error)}"
            self.capturer.quarantine(cell, cell.info.executor, reason)
            raise GraphReplayError(f"graph {cell.info.name}: {reason}") from error

    def _canary(self, cell: Cell, shape: StepShape) -> None:
        """Replay, recompute eagerly, compare; the eager results are what the caller gets."""
        assert cell.graph is not None
        self._canaries += 1
        computation, executor = self.computation, cell.info.executor
        state = StepState(computation, shape)
        before = state.read()
        model = self.capturer.model(executor)
        found: object
        try:
            found = check_live(
                computation, cell.graph, cell.shape, shape, model, state, before, exact=self._exact
            )
        except Exception as error:
            found = describe(error)
            state.write(before)
            computation.forward(cell.shape, model)
        if self._agree(found is None):
            return
        self.canary_failures += 1
        inputs = computation.inputs(cell.shape)
        live = {name: each.clone() for name, each in inputs.items()}

        def refill() -> None:
            for name, values in live.items():
                inputs[name].copy_(values)

        state.write(before)
        where = self.capturer.where(cell, shape, refill)
        refill()
        state.write(before)
        reason = f"canary: {found or 'wrong on another rank'}{where}"
        self.capturer.quarantine(cell, executor, reason)
        computation.forward(cell.shape, computation.model)

    # ---- report --------------------------------------------------------------------------

    def report(self) -> GraphReport:
        """What has been captured, proven, refused and replayed so far."""
        return GraphReport(
            requested=str(self.requested),
            plan={phase: self.plan.of(phase) for phase in PHASES},
            downgrades=[
                {"phase": each.phase, "wanted": each.wanted, "got": each.got,
                 "reason": each.reason}
                for each in self.plan.downgrades
            ],
            verify=str(self.verify),
            graphs=[each.info for each in self.cells.values()],
            eager_steps=self._eager_steps,
            canaries=self._canaries,
            canary_failures=self.canary_failures,
            memory=self.memory,
            capture_seconds=self._seconds[0],
            verify_seconds=self._seconds[1],
            blind_inputs=self._blind,
        )  # fmt: skip
