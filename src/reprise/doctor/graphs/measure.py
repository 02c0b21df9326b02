"""Fill in the graph matrix: capture, verify and time each executor at each size."""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from reprise.doctor.graphs.parts import Part, parts_of
from reprise.doctor.graphs.places import Places
from reprise.doctor.graphs.proof import proof_of, refusal
from reprise.doctor.graphs.report import (
    Absent,
    BucketMemory,
    GraphMatrix,
    MatrixCell,
    Timeline,
    Where,
    executor_of,
    row,
)
from reprise.doctor.graphs.timeline import eager_bars, graph_bars
from reprise.doctor.timing import compare_ms, median_ms
from reprise.graphs import Buckets, GraphPlan, GraphRunner, Probe, predict
from reprise.graphs.capture import BucketGraph
from reprise.graphs.mend import mend
from reprise.graphs.plan import Executor
from reprise.runner import ModelRunner
from reprise.shape import PHASES, Phase, StepShape
from reprise.testing import faults

Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)

CONTEXTS = (1, 64, 512, 2048, 8192, 32768, 131072)
BUCKETS = Buckets(decode=(1, 4, 16, 64), mixed=(16, 64, 256))
TIMELINE_CONTEXT = 512
"""About the context of the step whose timeline is shown."""


def default_contexts(longest: int) -> list[int]:
    """A few lengths on a logarithmic scale, and the longest that the model has."""
    return [*(each for each in CONTEXTS if each < longest), longest]


def default_buckets(max_requests: int, max_tokens: int) -> Buckets:
    """Few enough to look at."""
    return Buckets(
        decode=tuple(each for each in BUCKETS.decode if each <= max_requests) or (max_requests,),
        mixed=tuple(each for each in BUCKETS.mixed if each <= max_tokens) or (max_tokens,),
    )


def measure(
    runner: ModelRunner,
    facts: dict[str, Any],
    *,
    executors: Sequence[Executor],
    buckets: Buckets,
    contexts: Sequence[int],
    fault: tuple[str, str] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> GraphMatrix:
    """Measure a model runner that has captured no graphs itself.

    Args:
        runner: Its requests and cache are not in use.
        facts: For the head of the report.
        executors: Rows of the matrix; ``none`` stands for eager execution.
        buckets: Sizes of each phase.
        contexts: Lengths of the longest request of a step.
        fault: Name of a fault and the op to put it into, while graphs are captured.
        progress: Told of every cell.
    """
    parts = parts_of(runner)
    matrix = GraphMatrix(
        facts,
        [row(part.owner, each) for part in parts for each in part.of(executors)],
        {phase: list(buckets.of(phase)) for phase in PHASES},
        list(contexts),
        phases={
            row(part.owner, each): list(part.phases)
            for part in parts
            for each in part.of(executors)
            if part.phases != PHASES
        },
        fault=None if fault is None else _fault_facts(*fault),
    )
    with runner.ops.computing():
        for part in parts:
            work = _Measurement(runner, part, matrix, buckets, fault, progress)
            work.eager()
            for each in part.of(executors):
                if each != "none":
                    with work.injected(each):
                        work.executor(each)
    _share_eager_times(matrix)
    runner.forget_steps()
    order = matrix.executors
    matrix.cells.sort(
        key=lambda e: (order.index(e.executor), PHASES.index(e.phase), e.bucket, e.context)
    )
    return matrix


def _share_eager_times(matrix: GraphMatrix) -> None:
    """One eager time a step: the median of those taken beside the graphs.

    So that a speed-up is the ratio of the two times that the report shows.
    """
    for eager in matrix.cells:
        if executor_of(eager.executor) != "none":
            continue
        owner = eager.executor.removesuffix("none")
        step = (eager.phase, eager.bucket, eager.context)
        beside = [
            each
            for each in matrix.cells
            if each.replay_ms is not None
            and each.executor.removesuffix(executor_of(each.executor)) == owner
            and (each.phase, each.bucket, each.context) == step
        ]
        taken = [each.eager_ms for each in beside if each.eager_ms is not None]
        if taken:
            eager.eager_ms = statistics.median(taken)
        for each in beside:
            each.eager_ms = eager.eager_ms


def _fault_facts(name: str, op: str) -> dict[str, str]:
    return {"name": name, "op": op, "summary": faults.FAULTS[name].summary}


class _Measurement:
    def __init__(
        self,
        runner: ModelRunner,
        part: Part,
        matrix: GraphMatrix,
        buckets: Buckets,
        fault: tuple[str, str] | None,
        progress: Progress,
    ) -> None:
        self.runner, self.matrix, self.buckets, self.fault = runner, matrix, buckets, fault
        self.platform = runner.platform
        self.part, self.computation = part, part.computation
        own = sum(each.rpartition(", ")[0] == part.owner for each in matrix.executors)
        self.total = len(matrix.cells) + len(self.shapes()) * len(matrix.contexts) * own
        self.progress = functools.partial(self._advance, progress)

    def _advance(self, progress: Progress, what: str) -> None:
        progress(what, len(self.matrix.cells), self.total)

    def shapes(self) -> list[StepShape]:
        most = self.runner.config.max_num_seqs
        shapes = [
            *(StepShape.decode(size, self.part.width) for size in self.buckets.decode),
            *(StepShape.mixed(size, min(size, most)) for size in self.buckets.mixed),
        ]
        return [each for each in shapes if each.phase in self.part.phases]

    # ---- eager execution -----------------------------------------------------------------

    def eager(self) -> None:
        """The cells and timelines of eager execution, and the names of the ops."""
        first = self.shapes()[0]
        self.computation.probe(first, 1).fill()
        self.places = Places(self.part.model, self._forward(first))
        eager = row(self.part.owner, "none")
        if eager not in self.matrix.executors:
            return
        for shape in self.shapes():
            run = self._forward(shape)
            for context in self.matrix.contexts:
                self.computation.probe(shape, context).fill()
                run()
                made = MatrixCell(eager, shape.phase, shape.size, context)
                made.eager_ms = median_ms(self.platform, run)
                self.matrix.cells.append(made)
                self.progress("eager")
        for shape, context in map(self.timeline_step, self.part.phases):
            self.computation.probe(shape, context).fill()
            run = self._forward(shape)
            total = median_ms(self.platform, run)
            bars = eager_bars(self.platform, run, self.places)
            self._add_timeline(eager, shape, context, total, bars)

    def _forward(self, shape: StepShape) -> Callable[[], Any]:
        return functools.partial(self.computation.forward, shape, self.computation.model)

    # ---- graphs --------------------------------------------------------------------------

    @contextlib.contextmanager
    def injected(self, executor: Executor) -> Any:
        """The fault in its op, if there is one to inject and this executor can express it."""
        if self.fault is None:
            yield
            return
        name, op = self.fault
        declared = self.places.ops.get(op)
        if declared is None and self.part.owner:
            yield
            return
        assert declared is not None, f"the model calls {op}"
        reason = faults.FAULTS[name].inexpressible(declared, executor, self.platform)
        if reason is not None:
            self.matrix.notes.append(f"{executor}: {name} cannot exist in {op} here: {reason}")
            yield
            return
        with faults.inject(name, self.runner.ops, op, self.runner.forward_pass):
            yield

    def executor(self, executor: Executor) -> None:
        """All cells of one executor."""
        name = row(self.part.owner, executor)
        wanted: dict[Phase, Executor] = dict.fromkeys(PHASES, "none")
        wanted |= dict.fromkeys(self.part.phases, executor)
        graphs = GraphRunner(
            self.computation,
            self.platform,
            GraphPlan(wanted["decode"], wanted["mixed"]),
            self.buckets,
            self.runner.config.max_num_seqs,
            query_lens=(self.part.width,),
            owner=self.part.owner,
        )
        for each in graphs.plan.downgrades:
            if each.wanted == executor:
                self.matrix.absent.append(Absent(name, each.phase, each.reason))
        missing = {each.phase for each in self.matrix.absent if each.executor == name}
        self.total -= sum(shape.phase in missing for shape in self.shapes()) * len(
            self.matrix.contexts
        )
        self.matrix.memory_note = predict(graphs.captures).note
        with graphs.capturer.ready():
            graphs.guard.learn_weights()
            captured = [
                self._capture(graphs, shape)
                for shape in graphs.captures.shapes
                if shape.phase not in missing
            ]
            mend(graphs.computation, graphs.guard)
            graphs.prover.begin(captured)
            for bucket in reversed(captured):
                for context in self.matrix.contexts:
                    self.matrix.cells.append(self._cell(graphs, bucket, name, context))
                    self.progress(executor)
            for phase in self.part.phases:
                shape, context = self.timeline_step(phase)
                found = next((e for e in captured if e.shape == shape), None)
                if found is not None and found.graph is not None:
                    self.computation.probe(shape, context).fill()
                    total = median_ms(self.platform, found.graph.replay)
                    bars = graph_bars(self.platform, found.graph, self.places)
                    self._add_timeline(name, shape, context, total, bars)
            self._prove(graphs, captured, name)
        graphs.captures.discard()

    def _prove(self, graphs: GraphRunner, captured: list[BucketGraph], executor: str) -> None:
        """What start-up would prove of the graphs, in the time that it would take for it."""
        mend(graphs.computation, graphs.guard)  # what has run so far is not to be taken for right
        seconds = sum(each.info.capture_seconds for each in captured)
        graphs.prover.prove(captured, seconds, lambda *_: self.progress(f"verify {executor}"))
        proven = {id(each.info) for each in captured}
        self.matrix.proofs += [
            proof_of(executor, each, self.places)
            for each in reversed(graphs.report().graphs)
            if id(each) in proven
        ]

    def _capture(self, graphs: GraphRunner, shape: StepShape) -> BucketGraph:
        """Capture a bucket; ``graph`` stays None if that fails, ``info`` says why."""
        self.progress(f"capture {graphs.plan.of(shape.phase)}")
        measured = self.platform.graph_memory == "measure"
        before = self._free() if measured else 0
        bucket = graphs.captures.capture_bucket(shape)
        grown = bucket.info.bytes
        if bucket.info.executor != bucket.info.planned:
            bucket.graph = None
        else:
            actual = max(0, before - self._free()) if measured else grown
            self.matrix.memory.append(
                BucketMemory(
                    row(self.part.owner, bucket.info.planned),
                    shape.phase,
                    shape.size,
                    bucket.info.predicted_bytes,
                    actual,
                )
            )
        return bucket

    def _free(self) -> int:
        self.platform.synchronize()
        self.platform.empty_cache()
        return self.platform.memory_info().free

    def _cell(
        self, graphs: GraphRunner, bucket: BucketGraph, executor: str, context: int
    ) -> MatrixCell:
        shape = bucket.shape
        made = MatrixCell(executor, shape.phase, shape.size, context)
        if bucket.graph is None:
            made.reason = refusal(executor, bucket.info)
            made.where = self.places.in_text(made.reason)
            return made
        made.captured = True
        probe = self.computation.probe(shape, context)
        verdict = graphs.judge.compare(bucket, probe, cold=True)
        spoiled = graphs.guard.wrong_weights()
        if spoiled:
            mend(graphs.computation, graphs.guard, spoiled)
            made.reason = f"it changed {', '.join(spoiled)}, which nothing may change"
            made.tensor = spoiled[0]
            return made
        if verdict.right:
            made.verified, made.largest_difference = True, 0.0
            made.eager_ms, made.replay_ms, made.sure = compare_ms(
                self.platform, self._forward(shape), bucket.graph.replay
            )
            return made
        made.reason = verdict.told
        if verdict.differences:
            worst = verdict.differences[0]
            made.largest_difference, made.tensor = worst.largest, worst.tensor
        elif verdict.changes and verdict.error is None:
            # The results are right, so that no op leaves the path.
            made.tensor = str(verdict.changes[0])
            return made
        made.where = self.places.in_text(made.reason) or self._locate(graphs, bucket, probe)
        return made

    def _locate(self, graphs: GraphRunner, bucket: BucketGraph, probe: Probe) -> Where | None:
        try:
            location = graphs.judge.locate(bucket, probe.live, probe.fill)
        except Exception as error:
            logger.warning("%s of %s: not traced: %s", bucket.info.executor, bucket.shape, error)
            return None
        return None if location is None else self.places.where(location)

    # ---- timelines -----------------------------------------------------------------------

    def timeline_step(self, phase: Phase) -> tuple[StepShape, int]:
        """A step of middling size."""
        shapes = [each for each in self.shapes() if each.phase == phase]
        context = min(self.matrix.contexts, key=lambda each: abs(each - TIMELINE_CONTEXT))
        return shapes[(len(shapes) - 1) // 2], context

    def _add_timeline(
        self, executor: str, shape: StepShape, context: int, total: float, bars: list[Any]
    ) -> None:
        self.matrix.timelines.append(
            Timeline(executor, shape.phase, shape.size, context, total, bars)
        )
