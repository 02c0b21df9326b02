"""The one entry through which a model runs: replay where a proven graph fits, eager elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from reprise import timeline
from reprise.distributed import ALONE_AGREES, Agreement
from reprise.errors import describe
from reprise.graphs.blind import blind_inputs, told
from reprise.graphs.buckets import Buckets
from reprise.graphs.canary import CanaryPolicy
from reprise.graphs.capture import BucketGraph, Capturer, Key, Progress
from reprise.graphs.contract import Computation
from reprise.graphs.deferred import REASON, WANTED, Deferred, split
from reprise.graphs.guard import Guard
from reprise.graphs.idle import IdleProof
from reprise.graphs.judge import Judge
from reprise.graphs.outcome import EAGERLY
from reprise.graphs.plan import Executor, GraphPlan, Wanted
from reprise.graphs.pool import GraphPool
from reprise.graphs.prove import Prover
from reprise.graphs.replay import Replays
from reprise.graphs.report import GraphInfo, GraphMemory, GraphReport
from reprise.graphs.trust import Ledger
from reprise.graphs.useless import Useless
from reprise.graphs.uses import Uses, largest_error, may_capture, plan_for, uses_of_phase
from reprise.graphs.verify import COPIES, VerifyMode
from reprise.platforms import Platform
from reprise.shape import PHASES, Phase, StepShape

logger = logging.getLogger(__name__)

LAZY_SHARE = 0.25
"""Of the time that start-up has for probes at least, what a lazy runner has."""


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
        lazy: Most buckets are captured when steps want them, or when nothing runs, so that a start
            does not wait for them; until then their steps run eagerly.
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
        lazy: bool = False,
    ) -> None:
        self.owner = owner
        self.lazy = lazy
        self.deferred = Deferred()
        self.computation = computation
        self.platform = platform
        self.buckets = buckets
        self.requested = plan
        self.verify = verify
        self.memory = GraphMemory()
        self.predicted_bytes: dict[StepShape, int] = {}
        self._agreement = agreement
        self._query_lens = tuple(query_lens)
        self._max_requests = max_requests
        if not may_capture(plan, platform):
            used = {}
        elif used is None:
            asked = [phase for phase in PHASES if plan.of(phase) != "none"]
            used = {each: uses_of_phase(computation, each, self._query_lens) for each in asked}
        error = largest_error(each for uses in used.values() for _, each in uses)
        self.exact = error is None
        """Eager execution repeats itself to the bit; known where anything may be captured."""
        self.plan: GraphPlan[Executor] = plan_for(used, platform, plan, self._query_lens)
        self.bucket_graphs: dict[Key, BucketGraph] = {}
        self.guard = Guard(computation)
        self.canary = CanaryPolicy(verify)
        self.ledger = Ledger(computation.facts)
        pool = GraphPool(platform) if pool is None else pool
        self.capturer = Capturer(computation, platform, agreement, pool)
        self.judge = Judge(computation, platform, self.capturer, self.guard, agreement, error)
        self.useless = Useless(platform, agreement)
        self.prover = Prover(
            computation, self.capturer, self.judge, self.ledger, self.guard, self.useless, agreement
        )
        if lazy:
            self.prover.least_seconds *= LAZY_SHARE
        self.replays = Replays(
            computation, platform, self.canary, self.capturer, self.judge, self.ledger,
            self.guard, agreement, self.bucket_graphs,
        )  # fmt: skip
        self._idle = IdleProof(
            self.prover, self.judge, self.ledger, self.replays, agreement, self.bucket_graphs
        )
        self._found: tuple[StepShape, BucketGraph | None] | None = None
        """The last shape that was looked up, and its bucket."""
        self._result: tuple[StepShape, Tensor] | None = None
        """The shape of the last step, and its first output."""
        self.ran = EAGERLY
        """How the last step was computed."""
        self._capture_seconds = self._verify_seconds = 0.0
        self._eager_steps = 0
        self._unproven_eager = 0
        self._blind: dict[Phase, list[str]] = {}
        """Inputs that probes do not reach, for which they prove nothing of their phase."""

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

    def learn_weights(self) -> None:
        """The weights are right as they are: nothing has been captured yet. A later call changes
        nothing."""
        if not self.guard.knows_weights:
            self.weights_changed()

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
        if self.lazy:
            shapes, later = split(shapes)
            self._defer(later)
        free = self._free_memory()
        self.learn_weights()
        with self.capturer.ready():
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
                    buckets = [e for e in self.bucket_graphs.values() if not e.info.deferred]
                    self.prover.prove(buckets, self._capture_seconds, progress)
                    self._blind = blind_inputs(
                        self.computation, self.capturer, self.ledger, buckets
                    )
                self._verify_seconds = time.perf_counter() - started
        self._log_summary()
        self.canary.announce(
            [each for each in self.bucket_graphs.values() if each.graph is not None]
        )

    def capture_bucket(self, shape: StepShape) -> BucketGraph:
        """Capture one bucket with the plan's executor, or the next one that works."""
        bucket = self._new_bucket(shape)
        self.prover.capture_unproven(bucket, bucket.info.planned)
        return bucket

    def _new_bucket(self, shape: StepShape) -> BucketGraph:
        planned = self.plan.of(shape.phase)
        info = GraphInfo(shape.phase, shape.size, shape.query_len, planned, planned)
        info.owner = self.owner
        info.predicted_bytes = self.predicted_bytes.get(shape)
        bucket = self.bucket_graphs[shape.phase, shape.query_len, shape.size] = BucketGraph(
            shape, info
        )
        self._found = None
        return bucket

    # ---- later -------------------------------------------------------------------------------

    def _defer(self, shapes: Sequence[StepShape]) -> None:
        self.deferred.defer(shapes)
        for each in shapes:
            info = self._new_bucket(each).info
            info.executor, info.deferred = "none", REASON

    def capture_wanted(self) -> bool:
        """Capture one bucket that steps have wanted for long, if there is one. It is the next step
        that waits for it. The static inputs are not as before."""
        return self._capture_deferred(WANTED)

    def _capture_deferred(self, least: int) -> bool:
        shape = self.deferred.take(least)
        if shape is None:
            return False
        self.platform.synchronize()  # steps under way read and write what a capture overwrites
        started = time.perf_counter()
        with self.capturer.ready(collect=False):
            bucket = self.capture_bucket(shape)
            reached = self._blind.get(shape.phase) == []  # else nobody knows what probes prove
            if self.verify.startup and bucket.graph is not None and reached:
                self.prover.plan_later(bucket)
                bucket.info.check_seconds = max(
                    each.info.check_seconds
                    for each in self.bucket_graphs.values() if each.family == bucket.family
                )  # fmt: skip
        self.guard.forget()
        logger.info(
            "graph %s: captured in %.3f s (%s), %d others wait",
            bucket.info.name, time.perf_counter() - started, bucket.info.executor,
            len(self.deferred),
        )  # fmt: skip
        return True

    def discard(self) -> None:
        """Forget all graphs, and give their memory back if no other runner's graphs share it."""
        for key in self.bucket_graphs:
            self.ledger.leave(key)
        self.bucket_graphs.clear()
        self.deferred.clear()
        self._found = None
        self.prover.discard()
        self.capturer.discard()
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
            "steps of other kinds are compared, or run eagerly), %d quarantined, %d to be captured "
            "when steps want them or nothing runs; %.1f MiB",
            f"{self.owner} " if self.owner else "",
            self.plan,
            len(running),
            self._capture_seconds,
            self._verify_seconds,
            sum(each.verified for each in running),
            sum(not each.verified for each in running) if self.verify.startup else 0,
            sum(each.quarantined is not None for each in infos),
            len(self.deferred),
            sum(each.bytes for each in infos) / 2**20,
        )

    def prove_more(self) -> bool:
        """Capture one bucket that start-up has left out, or compare one graph on one planned probe
        that it had no time for. No step may be under way. What requests have left in the caches
        stays; what a graph spoils that is wrong is told as if a canary had found it
        (:attr:`Replays.damage`).

        Returns:
            Whether there may be more to do.
        """
        if self.deferred:
            return self._capture_deferred(0)
        if not self.canary.checks_kinds or not self.plan.captures:
            return False
        with self.computation.ops.computing():
            return self._idle.advance()

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
            if bucket is not None and self.deferred:
                self.deferred.note(bucket.shape)
            self._run_eagerly(shape, whole)
        else:
            self._run_graph(bucket, shape, whole)

    @property
    def unseen(self) -> str | None:
        """The graph that was replayed in the last step with nothing to compare it with, by name."""
        ran = self.ran
        if ran.proven or ran.graph is None:
            return None
        return self.bucket_graphs[ran.graph].info.name

    def caches_changed(self) -> None:
        """The caches were written on purpose, by no step: what was seen of them is out of date."""
        self.guard.forget()

    def weights_changed(self) -> None:
        """The weights were refilled on purpose: they are right as they are now."""
        if self.plan.captures and (self.verify.startup or self.verify.canary):
            with self.computation.ops.computing():
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
        self.ran = EAGERLY
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
            meets = not self._agreement.all(not meets)
        may_meet = not meets or policy.checks_everything
        if not may_meet and not self._agreement.all(policy.may_meet(bucket)):
            policy.put_off(bucket)
            bucket.info.eager_steps += 1
            self._unproven_eager += 1
            self._run_eagerly(shape, whole)
            return
        bucket.info.replays += 1
        if not policy.is_due(bucket) and not meets:
            self.ran = self.replays.replay(bucket)
            return
        ran = self.replays.compare(bucket, shape, unproven, meets=meets)
        if ran is None:
            self._run_eagerly(shape, whole)
        else:
            self.ran = ran

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
            canary_failures=self.replays.failures,
            unproven_eager=self._unproven_eager,
            bounds=dict(self.judge.bounds.measured),
            memory=self.memory,
            capture_seconds=self._capture_seconds,
            verify_seconds=self._verify_seconds,
            blind_inputs=told(self._blind),
        )  # fmt: skip
