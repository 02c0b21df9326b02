"""The one entry through which a model runs: replay where a proven graph fits, eager elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reprise import timeline
from reprise.distributed import ALONE_AGREES, Agreement
from reprise.errors import GraphReplayError, describe
from reprise.graphs.buckets import Buckets
from reprise.graphs.canary import CanaryPolicy
from reprise.graphs.capture import BucketGraph, Capturer, Key, Progress
from reprise.graphs.contract import Computation
from reprise.graphs.guard import Guard, Scope
from reprise.graphs.kinds import Kind
from reprise.graphs.plan import (
    Executor,
    GraphPlan,
    Wanted,
    outside_of_graphs,
    resolve,
    support_of,
)
from reprise.graphs.pool import GraphPool
from reprise.graphs.prove import Prover
from reprise.graphs.repair import make_good
from reprise.graphs.report import GraphInfo, GraphMemory, GraphReport
from reprise.graphs.trust import Ledger
from reprise.graphs.verify import COPIES, Verdict, VerifyMode, examine
from reprise.ops.implementation import Implementation
from reprise.ops.registry import Op, OpTable, intercept
from reprise.platforms import Platform
from reprise.shape import PHASES, Phase, StepShape

logger = logging.getLogger(__name__)

MOST_IDLE_SECONDS = 0.1
"""What a comparison takes at most that is made while no request runs: one that comes waits for
it."""

Uses = Sequence[tuple[Op, Implementation]]
"""Ops that are called, each with what computes it; one that several compute is there for each."""


def uses_of(table: OpTable, forward: Callable[[], Any]) -> Uses:
    """What ``forward`` calls, found by calling it. Nothing is computed: ops return memory of any
    content."""
    found: dict[tuple[str, str], tuple[Op, Implementation]] = {}

    def note(op: Op, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        implementation = table.implementation_of(op, args, kwargs)
        found[op.name, implementation.name] = op, implementation
        return op.fake(*args, **kwargs)

    with table.computing(), intercept(note):
        forward()
    return list(found.values())


@dataclass(frozen=True)
class Ran:
    """How a step was computed."""

    graph: Key | None
    """The graph that computed it; None: eager execution did."""
    proven: bool
    """It was compared with eager execution, and what left is the eager result."""
    first: bool = False
    """No step of its kind had been proven before."""


@dataclass(frozen=True)
class Damage:
    """What a graph that was found wrong has left behind, for the owner of the requests."""

    graph: Key
    name: str
    """For people: ``decode[4]``."""
    units: frozenset[tuple[str, int]]
    """Units of the caches, what and which, that it changed and must not have."""
    earlier: bool
    """Replays before this one went unseen, and may have been wrong as well."""
    wrong: frozenset[str]
    """What it got wrong or changed, by names of outputs and of :meth:`Computation.memory`; nothing:
    it raised."""


def largest_error(used: Iterable[Implementation]) -> float | None:
    """The largest declared error of the implementations that are not exact; None: all are. One
    that varies makes all that follows it vary."""
    return max((each.error for each in used if each.error is not None), default=None)


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
        agreement: Of the ranks that compute together: each has a runner like this one.
        used: What each phase calls; found by trial runs if left out.
        pool: Memory of graphs that never run beside these; None: one of their own.
        owner: What the computation is called where an engine has several; nothing: it is the
            target.
    """

    def __init__(
        self,
        computation: Computation,
        platform: Platform,
        plan: GraphPlan[Wanted],
        buckets: Buckets,
        max_requests: int,
        *,
        verify: VerifyMode = VerifyMode(),  # noqa: B008 - frozen
        query_lens: Iterable[int] = (1,),
        agreement: Agreement = ALONE_AGREES,
        used: Mapping[Phase, Uses] | None = None,
        pool: GraphPool | None = None,
        owner: str = "",
    ) -> None:
        self.owner = owner
        self.computation = computation
        self.platform = platform
        self.buckets = buckets
        self.requested = plan
        self.verify = verify
        self.memory = GraphMemory()
        self.predicted_bytes: dict[StepShape, int] = {}
        self._agreement, self._agree = agreement, agreement.all
        self._pool = GraphPool(platform) if pool is None else pool
        self._query_lens = tuple(query_lens)
        self._max_requests = max_requests
        self._error: float | None = None
        self.plan = self._resolve(used)
        self.bucket_graphs: dict[Key, BucketGraph] = {}
        self.alone = True
        """Nothing else writes the caches between two of its steps."""
        self._found: tuple[StepShape, BucketGraph | None] | None = None
        """The last shape that was looked up, and its bucket."""
        self._result: tuple[StepShape, Tensor] | None = None
        """The shape of the last step, and its first output."""
        self._replayed: dict[Key, Ran] = {}
        self.guard = Guard(computation)
        self.canary = CanaryPolicy(verify)
        self._start_capturing()
        self._capture_seconds = self._verify_seconds = 0.0
        self._eager_steps = 0
        self._unproven_eager = 0
        self._turn = 0
        self._unseen: dict[Key, int] = {}
        """Replays of each graph since it was last found right."""
        self.canary_failures = 0
        self.ran = Ran(None, proven=False)
        """How the last step was computed."""
        self.damage: Damage | None = None
        """See :meth:`take_damage`."""
        self._not_to_be_proven: set[Key] = set()
        """Graphs of which a probe did not run, for want of memory or of blocks."""
        self._blind: list[str] = []

    def _start_capturing(self) -> None:
        self.ledger = Ledger(self.computation.facts)
        self.capturer = Capturer(self.computation, self.platform, self._agreement, self._pool)
        self.prover = Prover(
            self.computation, self.platform, self.capturer, self.ledger, self.guard,
            self._agreement, error=self._error,
        )  # fmt: skip

    def _resolve(self, used: Mapping[Phase, Uses] | None) -> GraphPlan[Executor]:
        if not self._may_capture():
            used = {}
        elif used is None:
            asked = [phase for phase in PHASES if self.requested.of(phase) != "none"]
            used = {phase: self._uses(phase) for phase in asked}
        self._error = largest_error(each for uses in used.values() for _, each in uses)
        return resolve(
            self.requested,
            self.platform,
            {phase: support_of(uses, self.platform) for phase, uses in used.items()},
            refused={phase: outside_of_graphs(uses, self.platform) for phase, uses in used.items()},
            query_len=max(self._query_lens),
            compiler_reason=self.platform.compiler_missing(),
        )

    @property
    def exact(self) -> bool:
        """Eager execution repeats itself to the bit; known where anything may be captured."""
        return self._error is None

    def _may_capture(self) -> bool:
        idle = ("none",) if self.platform.graphs_by_default else ("none", "auto")
        return any(self.requested.of(phase) not in idle for phase in PHASES)

    def _uses(self, phase: Phase) -> Uses:
        """What one small step of each kind calls."""
        computation, shapes = self.computation, [StepShape.mixed(1, 1)]
        if phase == "decode":
            shapes = [StepShape.decode(1, each) for each in self._query_lens]

        def forward() -> None:
            for shape in shapes:
                computation.pad(shape.empty, shape)
                computation.forward(shape, computation.model)

        return uses_of(computation.ops, forward)

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

    def comparison_bytes(self) -> int:
        """What comparing the largest graph takes, beside what a step takes."""
        shapes = self.shapes() if self.verify != VerifyMode(startup=False) else []
        largest = [next((e for e in shapes if e.phase == phase), None) for phase in PHASES]
        computation = self.computation
        return max(
            (
                COPIES * computation.state(each).nbytes
                + sum(output.nbytes for output in computation.outputs(each).values())
                for each in largest
                if each is not None
            ),
            default=0,
        )

    def capture_all(self, progress: Progress | None = None) -> None:
        """Capture every bucket, then verify each graph. Never raises for a graph's sake.

        The computation's state is as before, its static inputs are not.
        """
        shapes = self.shapes()
        if not shapes:
            return
        free = self._free_memory()
        with self.capturer.ready():
            if self.verify.startup or self.verify.canary:
                self.guard.learn_weights()  # before anything could have changed them
            started = time.perf_counter()
            for done, shape in enumerate(shapes):
                self.capture_bucket(shape)
                if progress is not None:
                    progress("capture graphs", done + 1, len(shapes))
            self.platform.synchronize()
            self._capture_seconds = time.perf_counter() - started
            if free is not None and (left := self._free_memory()) is not None:
                self.memory.actual = max(0, free - left)
            if self.verify.startup:
                started = time.perf_counter()
                with timeline.span("verify"):
                    buckets = list(self.bucket_graphs.values())
                    self.prover.prove(buckets, self._capture_seconds, progress)
                    self._blind = self.prover.blind_inputs(buckets)
                self._verify_seconds = time.perf_counter() - started
        self._log_summary()
        self.canary.announce(
            [each for each in self.bucket_graphs.values() if each.graph is not None]
        )

    def capture_bucket(self, shape: StepShape) -> BucketGraph:
        """Capture one bucket with the plan's executor, or the next one that works."""
        planned = self.plan.of(shape.phase)
        info = GraphInfo(shape.phase, shape.size, shape.query_len, planned, planned)
        info.owner = self.owner
        info.predicted_bytes = self.predicted_bytes.get(shape)
        bucket = self.bucket_graphs[shape.phase, shape.query_len, shape.size] = BucketGraph(
            shape, info
        )
        self._found = None
        self.prover.capture_unproven(bucket, planned)
        return bucket

    def discard(self) -> None:
        """Forget all graphs, and give their memory back if no other runner's graphs share it."""
        self.bucket_graphs.clear()
        self._found = None
        self._pool.discard()
        self._start_capturing()
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
        infos = [each.info for each in self.bucket_graphs.values()]
        running = [each for each in infos if each.executor != "none"]
        logger.info(
            "%sgraphs: %s; %d captured in %.2f s; in %.2f s %d verified, %d proven in part (live "
            "steps of other kinds are compared, or run eagerly), %d quarantined; %.1f MiB",
            f"{self.owner} " if self.owner else "",
            self.plan,
            len(running),
            self._capture_seconds,
            self._verify_seconds,
            sum(each.verified for each in running),
            sum(not each.verified for each in running) if self.verify.startup else 0,
            sum(each.quarantined is not None for each in infos),
            sum(each.bytes for each in infos) / 2**20,
        )

    def prove_more(self) -> bool:
        """Compare one graph on one planned probe that start-up had no time for. No step may be
        under way. What requests have left in the caches stays; what a graph spoils that is wrong is
        told as if a canary had found it (:meth:`take_damage`).

        Returns:
            Whether there may be more to do.
        """
        if not self.canary.checks_kinds or not self.plan.captures:
            return False
        buckets = [
            each for each in self.bucket_graphs.values() if each.key not in self._not_to_be_proven
        ]
        found = self.prover.lacking(buckets, MOST_IDLE_SECONDS)
        if found is None:
            return False
        bucket, probe = found
        with self.computation.ops.computing():
            # All weights: after start-up nobody else looks at them all.
            verdict = self.prover.compare(
                bucket, probe, scope=lambda: replace(self._scope(bucket), part=None)
            )
            if not self._agree(verdict.ran):
                self._not_to_be_proven.add(bucket.key)
                logger.warning(
                    "graph %s: probe %r did not run and its graph stays %s: %s",
                    bucket.info.name, probe.name, bucket.info.proof, verdict.told,
                )  # fmt: skip
            elif self._agree(verdict.right):
                bucket.info.probes += 1
                self.ledger.prove(bucket.key, probe.kind, "start")
                self._tell_progress()
            else:
                self._make_good(bucket, probe.live, verdict, f"probe {probe.name!r}")
        return True

    def _tell_progress(self) -> None:
        """One log line when the last graph has met all its probes."""
        buckets = list(self.bucket_graphs.values())
        self.prover.conclude(buckets)
        running = [each.info for each in buckets if each.graph is not None]
        if all(each.verified for each in running):
            logger.info("graphs: all %d are verified, while no request ran", len(running))

    # ---- steps ---------------------------------------------------------------------------

    def run(self, shape: StepShape, at_least: StepShape | None = None) -> Tensor:
        """Compute one step; the static inputs hold its values.

        A step of a kind that its graph was not proven on is never replayed unseen: it is compared
        with eager execution, or runs eagerly where comparisons have cost enough lately.

        Args:
            shape: The step's; it may be empty.
            at_least: A shape that must fit too, where others that compute the same step together
                with this runner have more to do: all take one bucket.

        Returns:
            The first output's rows of this step, overwritten by the next one.

        Raises:
            GraphReplayError: A replay failed, or has changed what it was compared with, and
                nothing has computed the step; its graph is refused.
            WeightsLostError: A graph has changed weights that cannot be loaded again.
            ValueError: Both shapes are of different phases.
        """
        computation = self.computation
        if computation.ops.is_computing():
            self._run(shape, at_least)
        else:
            with computation.ops.computing():
                self._run(shape, at_least)
        if self._result is None or self._result[0] != shape:
            self._result = shape, next(iter(computation.outputs(shape).values()))
        return self._result[1]

    def _run(self, shape: StepShape, at_least: StepShape | None) -> None:
        whole = shape if at_least is None else shape.holding(at_least)
        bucket = self._bucket_for(whole)
        if bucket is None or bucket.graph is None:
            self._run_eagerly(shape, whole)
        else:
            self._run_graph(bucket, shape, whole)

    def take_damage(self) -> Damage | None:
        """What the last step's graph has left behind, told once; None: nothing."""
        damage, self.damage = self.damage, None
        return damage

    def caches_changed(self) -> None:
        """The caches were written on purpose, by no step: what was seen of them is out of date."""
        self.guard.forget()

    def weights_changed(self) -> None:
        """The weights were refilled on purpose: they are right as they are now."""
        with self.computation.ops.computing():
            if self.verify.startup and self.plan.captures:
                self.guard.learn_weights()

    def padded(self, shape: StepShape, at_least: StepShape | None = None) -> StepShape:
        """What :meth:`run` pads a step to: its bucket, or nothing more than ``at_least`` if none
        holds it."""
        whole = shape if at_least is None else shape.holding(at_least)
        bucket = self._bucket_for(whole)
        return whole if bucket is None or bucket.graph is None else bucket.shape

    def executor_for(self, shape: StepShape) -> Executor:
        """What would run a step of this shape."""
        bucket = self._bucket_for(shape)
        return "none" if bucket is None or bucket.graph is None else bucket.info.executor

    def _bucket_for(self, shape: StepShape) -> BucketGraph | None:
        if self._found is not None and self._found[0] == shape:
            return self._found[1]
        size = self.buckets.bucket_for(shape.phase, shape.size)
        found = None
        if size is not None:
            found = self.bucket_graphs.get((shape.phase, shape.query_len, size))
        self._found = shape, found
        return found

    def _run_eagerly(self, shape: StepShape, whole: StepShape) -> None:
        """``whole``: with padding."""
        self._eager_steps += 1
        self.ran = Ran(None, proven=False)
        self.guard.forget()
        if whole != shape:
            self.computation.pad(shape, whole)
        self.computation.forward(whole, self.computation.model)

    def _run_graph(self, bucket: BucketGraph, shape: StepShape, whole: StepShape) -> None:
        computation, policy = self.computation, self.canary
        if shape != bucket.shape:
            computation.pad(shape, bucket.shape)
        unproven = None
        if policy.checks_kinds:
            kind = computation.kind(shape, bucket.shape)
            if not self.ledger.trusts(bucket.key, kind):
                unproven = kind
        meets = unproven is not None
        """It is of such a kind on some rank."""
        if policy.checks_kinds and not self._agreement.alike:
            meets = not self._agree(not meets)
        if meets and not policy.checks_everything and not self._agree(policy.may_meet(bucket)):
            policy.put_off(bucket)
            bucket.info.eager_steps += 1
            self._unproven_eager += 1
            self._run_eagerly(shape, whole)
            return
        bucket.info.replays += 1
        if policy.is_due(bucket) or meets:
            self._compare(bucket, shape, whole, unproven, meets=meets)
        else:
            self.guard.forget()
            self._unseen[bucket.key] = self._unseen.get(bucket.key, 0) + 1
            ran = self._replayed.get(bucket.key)
            if ran is None:
                ran = self._replayed[bucket.key] = Ran(bucket.key, proven=False)
            self.ran = ran
            self._replay(bucket)

    def _replay(self, bucket: BucketGraph) -> None:
        assert bucket.graph is not None
        try:
            bucket.graph.replay()
        except Exception as error:
            reason = f"replay: {describe(error)}"
            self._refuse(bucket, reason, frozenset())
            self.guard.settle_ops()
            raise GraphReplayError(f"graph {bucket.info.name}: {reason}") from error

    # ---- canaries ------------------------------------------------------------------------

    def _compare(
        self,
        bucket: BucketGraph,
        shape: StepShape,
        whole: StepShape,
        unproven: Kind | None,
        *,
        meets: bool,
    ) -> None:
        """Compute eagerly, replay, compare; the eager results are what the caller gets."""
        assert bucket.graph is not None
        if not self.alone:
            self.guard.forget()
        self.platform.synchronize()  # what was submitted before is not the canary's time
        began = time.perf_counter()
        bucket.info.canaries += 1
        computation, bounds, executor = self.computation, self.prover.bounds, bucket.info.executor
        model, bound = computation.model, bounds.of(executor)
        if computation.follow is not None:
            # What it draws is compared, too; that compiled code is right, start-up has shown.
            model, bound = self.capturer.model(executor), bounds.inexact
        try:
            verdict = examine(
                computation, self.guard, bucket.graph, bucket.shape, shape, model,
                self._scope(bucket), bound=bound, keep=True,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            if self._agreement.size > 1:
                raise  # others wait in a collective that this rank did not come to
            logger.warning(
                "graph %s: a canary lacks memory and its step runs eagerly: %s",
                bucket.info.name, describe(error),
            )  # fmt: skip
            self._run_eagerly(shape, whole)
            return
        seconds = self._agreement.largest(time.perf_counter() - began)
        bucket.info.check_seconds += (seconds - bucket.info.check_seconds) / 2
        if meets:
            self.canary.met(bucket, seconds)
        if verdict.error is not None:
            self._agreement.fell_out(f"a canary of graph {bucket.info.name}: {verdict.error}")
        if self._agree(verdict.right):
            self._unseen[bucket.key] = 0
            self.ran = Ran(bucket.key, proven=True, first=unproven is not None)
            if unproven is not None:
                met = computation.kind(shape, bucket.shape, exact=True)
                self.ledger.prove(bucket.key, met, "live")
            return
        self.ran = Ran(None, proven=False)
        if self._make_good(bucket, shape, verdict, "canary"):
            raise GraphReplayError(f"graph {bucket.info.name} has changed what its canary keeps")

    def _scope(self, bucket: BucketGraph) -> Scope:
        if self.canary.checks_everything:
            return Scope()
        self._turn += 1
        return self.guard.part(self.computation.state(bucket.shape).near(), self._turn)

    def _make_good(
        self, bucket: BucketGraph, shape: StepShape, verdict: Verdict, found_by: str
    ) -> bool:
        """Refuse a graph that was found wrong, and repair what it did. Returns whether the step is
        lost: there is no eager result that could be trusted."""
        self.canary_failures += 1
        harm = make_good(
            self.computation, self.guard, self.prover, bucket, shape, verdict, self._agree
        )
        # Others may have changed weights that were not looked at.
        earlier = harm.earlier or (harm.weights and not self.canary.checks_everything)
        if self._agreement.size > 1:  # what it did to other ranks' caches, this one cannot tell
            earlier = not self._agree(not earlier and not harm.units)
        wrong = frozenset(each.tensor for each in verdict.differences) | harm.changed
        self._refuse(bucket, f"{found_by}: {harm.told}", harm.units, earlier=earlier, wrong=wrong)
        if harm.lost:
            self.guard.settle_ops()
        return harm.lost

    def _refuse(
        self,
        bucket: BucketGraph,
        reason: str,
        units: frozenset[tuple[str, int]],
        *,
        earlier: bool = False,
        wrong: frozenset[str] = frozenset(),
    ) -> None:
        """Never replay the bucket's graph again; look at its siblings soon."""
        family = bucket.family
        unseen = self._unseen.pop(bucket.key, 0)
        self.capturer.quarantine(bucket, bucket.info.executor, reason)
        self.ledger.leave(bucket.key)
        siblings = [
            e for e in self.bucket_graphs.values() if e.graph is not None and e.family == family
        ]
        self.canary.hurry(siblings)
        earlier = earlier or unseen > 0
        self.damage = Damage(bucket.key, bucket.info.name, units, earlier, wrong)

    # ---- report --------------------------------------------------------------------------

    def report(self) -> GraphReport:
        """What has been captured, proven, refused and replayed so far."""
        for bucket in self.bucket_graphs.values():
            info = bucket.info
            info.pairs = self.ledger.num_pairs(bucket.key)
            info.facts = self.ledger.known(bucket.key) if bucket.graph is not None else {}
            info.canary_every = self.canary.every(bucket) if bucket.graph is not None else None
        return GraphReport(
            requested=str(self.requested),
            plan={phase: self.plan.of(phase) for phase in PHASES},
            downgrades=[
                {"phase": each.phase, "wanted": each.wanted, "got": each.got,
                 "reason": each.reason}
                for each in self.plan.downgrades
            ],
            verify=str(self.verify),
            graphs=[each.info for each in self.bucket_graphs.values()],
            eager_steps=self._eager_steps,
            canaries=sum(each.info.canaries for each in self.bucket_graphs.values()),
            canary_failures=self.canary_failures,
            unproven_eager=self._unproven_eager,
            bounds=dict(self.prover.bounds.measured),
            memory=self.memory,
            capture_seconds=self._capture_seconds,
            verify_seconds=self._verify_seconds,
            blind_inputs=self._blind,
        )  # fmt: skip
