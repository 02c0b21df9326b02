"""Which buckets are captured, and when: at start, when steps want them, or when nothing runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from reprise import timeline
from reprise.distributed import Agreement
from reprise.errors import GraphReplayError, describe
from reprise.graphs.alone import run_alone
from reprise.graphs.blind import blind_inputs
from reprise.graphs.bucket_graphs import BucketGraphs
from reprise.graphs.canary import CanaryPolicy
from reprise.graphs.capture import BucketGraph, Capturer, Progress
from reprise.graphs.contract import Computation
from reprise.graphs.deferred import REASON, WANTED, Deferred, split
from reprise.graphs.guard import Guard, Scope
from reprise.graphs.idle import IdleProof, nobody
from reprise.graphs.padding import write_padding
from reprise.graphs.plan import Executor, GraphPlan
from reprise.graphs.prove import Prover
from reprise.graphs.replay import Replays
from reprise.graphs.report import GraphInfo, GraphMemory
from reprise.graphs.trust import Ledger
from reprise.graphs.useless import Useless
from reprise.graphs.verdict import Verdict
from reprise.graphs.verify import COPIES
from reprise.graphs.verify_mode import VerifyMode
from reprise.platforms import Platform
from reprise.shape import PHASES, Phase, StepShape

logger = logging.getLogger(__name__)

LAZY_SHARE = 0.25
"""Of the time that start-up has for probes at least, what lazy captures have."""


class Captures:
    """Has the graphs of one computation made and proven.

    Args:
        computation: Whose graphs they are.
        platform: The device.
        plan: The executors to capture with.
        shapes: Every bucket that is to be captured, largest first.
        graphs: Gets them.
        capturer: Makes them.
        prover: Proves them at start, and captures the fallback of those that are wrong.
        useless: Knows which would gain nothing.
        idle: Proves them while nothing runs.
        replays: Refuse what a capture behind start-up has spoiled memory for.
        guard: Of the computation's memory.
        ledger: Of what is proven.
        policy: Of canaries.
        verify: When to compare graphs with eager execution.
        agreement: Of the ranks that compute together.
        owner: See :class:`~reprise.graphs.runner.GraphRunner`, as of ``lazy``.
    """

    def __init__(
        self,
        computation: Computation,
        platform: Platform,
        plan: GraphPlan[Executor],
        shapes: Sequence[StepShape],
        graphs: BucketGraphs,
        capturer: Capturer,
        prover: Prover,
        useless: Useless,
        idle: IdleProof,
        replays: Replays,
        guard: Guard,
        ledger: Ledger,
        policy: CanaryPolicy,
        verify: VerifyMode,
        agreement: Agreement,
        *,
        owner: str,
        lazy: bool,
    ) -> None:
        self.platform, self.plan, self.shapes = platform, plan, shapes
        self.capturer = capturer
        self.deferred = Deferred()
        self.memory = GraphMemory()
        self.predicted_bytes: dict[StepShape, int] = {}
        self.capture_seconds = self.verify_seconds = 0.0
        """Of the start."""
        self.blind: dict[Phase, list[str]] = {}
        """Inputs that probes do not reach, for which they prove nothing of their phase."""
        self._computation = computation
        self._graphs = graphs
        self._prover, self._useless, self._idle = prover, useless, idle
        self._replays = replays
        self._guard, self._ledger, self._agreement = guard, ledger, agreement
        self._policy, self._verify = policy, verify
        self._owner, self.lazy = owner, lazy
        self._left_out: list[StepShape] = []
        if lazy:
            prover.least_seconds *= LAZY_SHARE

    # ---- start-up ------------------------------------------------------------------------

    def learn_weights(self) -> None:
        """The weights are right as they are, and what ops keep: nothing has been captured yet. A
        later call changes nothing."""
        if not self._guard.knows_weights:
            self.weights_changed()
            self._guard.learn_ops()

    def weights_changed(self) -> None:
        """The weights were refilled on purpose: they are right as they are now.

        What a graph has made of the old ones, such as a copy in another layout, is not. Those that
        stand for a family are compared at their next use, and their siblings if one is wrong. Where
        weights were zeros that are none now, comparisons have not shown what they are multiplied
        with, and what they have proven is proven anew.
        """
        if self.plan.captures and (self._verify.startup or self._verify.canary):
            hid = self._guard.zeros
            with self._computation.ops.computing():
                self._guard.learn_weights()
            hid -= self._guard.zeros
            for each in self._graphs.values():
                if each.graph is not None and (hid or each.blind):
                    self._doubt(each)
            self._policy.hurry(
                [
                    each
                    for each in self._graphs.values()
                    if each.graph is not None and self._ledger.is_anchor(each.key)
                ]
            )

    def _doubt(self, bucket: BucketGraph) -> None:
        """What the bucket's graph was compared on has shown nothing of some weights, and now they
        count: it is proven anew."""
        self._ledger.doubt(bucket.key)
        bucket.blind, bucket.info.probes, bucket.info.verified = False, 0, False
        bucket.later = self.blind.get(bucket.shape.phase) == []

    def leave_out_useless(self) -> None:
        """Find mixed steps that no graph makes faster, before any is captured or predicted. The
        static inputs are not as before."""
        mixed = [each for each in reversed(self.shapes) if each.phase == "mixed"]
        self._useless.foresee(mixed)
        least = self._useless.foreseen
        if least is not None:
            self._left_out = [each for each in mixed if each.size >= least]
            self.shapes = [each for each in self.shapes if each not in self._left_out]

    def comparison_bytes(self) -> int:
        """What comparing the largest graph takes, beside what a step takes."""
        shapes = self.shapes if self._verify != VerifyMode(startup=False) else []
        largest = [next((e for e in shapes if e.phase == phase), None) for phase in PHASES]
        computation = self._computation
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
        for each in self._left_out:
            info = self._new_bucket(each).info
            info.executor, info.dropped = "none", self._useless.reason
        shapes = self.shapes
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
            self.capture_seconds = time.perf_counter() - started
            if free is not None and (left := self._free_memory()) is not None:
                self.memory.actual = max(0, free - left)
            if self._verify.startup:
                started = time.perf_counter()
                with timeline.span("verify"):
                    buckets = [e for e in self._graphs.values() if not e.info.deferred]
                    self._prover.prove(buckets, self.capture_seconds, progress)
                    self.blind = blind_inputs(self._computation, self._ledger, buckets)
                self.verify_seconds = time.perf_counter() - started
        self._log_summary()
        self._policy.announce([each for each in self._graphs.values() if each.graph is not None])

    def capture_bucket(self, shape: StepShape) -> BucketGraph:
        """Capture one bucket with the plan's executor, or the next one that works."""
        bucket = self._new_bucket(shape)
        self._prover.capture_unproven(bucket, bucket.info.planned)
        return bucket

    def _new_bucket(self, shape: StepShape) -> BucketGraph:
        planned = self.plan.of(shape.phase)
        info = GraphInfo(shape.phase, shape.size, shape.query_len, planned, planned)
        info.owner = self._owner
        info.predicted_bytes = self.predicted_bytes.get(shape)
        bucket = self._graphs[shape.phase, shape.query_len, shape.size] = BucketGraph(shape, info)
        return bucket

    # ---- later -------------------------------------------------------------------------------

    def _defer(self, shapes: Sequence[StepShape]) -> None:
        self.deferred.defer(shapes)
        for each in shapes:
            info = self._new_bucket(each).info
            info.executor, info.deferred = "none", REASON

    def capture_wanted(self) -> bool:
        """Capture one bucket that steps have wanted for long, if there is one. It is the next step
        that waits for it. The static inputs are not as before.

        Raises:
            GraphReplayError: Meanwhile it changed what requests have; it is refused.
            WeightsLostError: It has changed weights that cannot be loaded again.
        """
        wanted = self._capture_deferred(WANTED)
        if wanted and self._replays.damage is not None:
            raise GraphReplayError(f"graph {self._replays.damage.name}: its capture was wrong")
        return wanted

    def _capture_deferred(self, least: int) -> bool:
        shape = self.deferred.take(least)
        if shape is None:
            return False
        self.platform.synchronize()  # steps under way read and write what a capture overwrites
        started = time.perf_counter()
        with self.capturer.ready():
            bucket = self._capture_beside_requests(shape)
            reached = self.blind.get(shape.phase) == []  # else it is not known what probes prove
            if self._verify.startup and bucket.graph is not None and reached:
                self._prover.plan_later(bucket)
                bucket.info.check_seconds = max(
                    each.info.check_seconds
                    for each in self._graphs.values() if each.family == bucket.family
                )  # fmt: skip
        self._guard.forget()
        logger.info(
            "graph %s: captured in %.3f s (%s), %d others wait",
            bucket.info.name, time.perf_counter() - started, bucket.info.executor,
            len(self.deferred),
        )  # fmt: skip
        return True

    def _capture_beside_requests(self, shape: StepShape) -> BucketGraph:
        """What cannot be captured is computed meanwhile, and all of it where graphs are recorded:
        a graph that is wrong may be so then."""
        if self._verify == VerifyMode(startup=False):
            return self.capture_bucket(shape)
        captured: list[BucketGraph] = []
        ready = False

        def capture() -> None:
            nonlocal ready
            ready = True
            if self._agreement.all(True):
                captured.append(self.capture_bucket(shape))

        try:
            write_padding(self._computation, shape)
            verdict = run_alone(self._computation, self._guard, capture, shape, Scope(part=None))
        except Exception as error:  # for want of memory, as it may be
            verdict = Verdict(error=describe(error), ran=False)
        except BaseException:
            self._replays.interrupted = self._graphs[shape.phase, shape.query_len, shape.size]
            raise
        if not ready:  # others do not begin either
            self._agreement.all(False)
        if captured:
            self._replays.captured(captured[0], verdict)
            return captured[0]
        bucket = self._new_bucket(shape)
        bucket.info.executor = "none"
        bucket.info.dropped = f"not captured: {verdict.told or 'another rank did not look'}"
        return bucket

    def discard(self) -> None:
        """Forget all graphs, and give their memory back if no other runner's graphs share it."""
        for key in self._graphs:
            self._ledger.leave(key)
        self._graphs.clear()
        self.deferred.clear()
        self._prover.discard()
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
        infos = [each.info for each in self._graphs.values()]
        running = [each for each in infos if each.executor != "none"]
        logger.info(
            "%sgraphs: %s; %d captured in %.2f s; in %.2f s %d verified, %d proven in part (live "
            "steps of other kinds are compared, or run eagerly), %d quarantined, %d to be captured "
            "when steps want them or nothing runs; %.1f MiB",
            f"{self._owner} " if self._owner else "",
            self.plan,
            len(running),
            self.capture_seconds,
            self.verify_seconds,
            sum(each.verified for each in running),
            sum(not each.verified for each in running) if self._verify.startup else 0,
            sum(each.quarantined is not None for each in infos),
            len(self.deferred),
            sum(each.bytes for each in infos) / 2**20,
        )

    def prove_more(self, wanted: Callable[[], bool] = nobody) -> bool:
        """Capture one bucket that start-up has left out, or compare one graph on one planned probe
        that it had no time for. No step may be under way. What requests have left in the caches
        stays; what a graph spoils that is wrong is told as if a canary had found it
        (:attr:`Replays.damage`).

        Args:
            wanted: As of :meth:`IdleProof.advance`.

        Returns:
            Whether there may be more to do.
        """
        with self._computation.ops.computing():
            if self.deferred:
                return self._capture_deferred(0)
            if not self._policy.checks_kinds or not self.plan.captures:
                return False
            return self._idle.advance(wanted)
