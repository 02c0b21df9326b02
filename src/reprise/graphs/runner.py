"""The one entry through which a model runs: replay where a proven graph fits, eager elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from reprise.distributed import ALONE_AGREES, Agreement
from reprise.graphs.blind import told
from reprise.graphs.bucket_graphs import BucketGraphs
from reprise.graphs.buckets import Buckets
from reprise.graphs.canary import CanaryPolicy
from reprise.graphs.capture import BucketGraph, Capturer
from reprise.graphs.captures import Captures
from reprise.graphs.contract import Computation
from reprise.graphs.guard import Guard
from reprise.graphs.idle import IdleProof
from reprise.graphs.judge import Judge
from reprise.graphs.outcome import EAGERLY
from reprise.graphs.plan import Executor, GraphPlan, Wanted
from reprise.graphs.pool import GraphPool
from reprise.graphs.prove import Prover
from reprise.graphs.replay import Replays
from reprise.graphs.report import GraphReport
from reprise.graphs.trust import Ledger
from reprise.graphs.useless import Useless
from reprise.graphs.uses import Uses, largest_error, may_capture, plan_for, uses_of_phase
from reprise.graphs.verify_mode import VerifyMode
from reprise.platforms import Platform
from reprise.shape import PHASES, Phase, StepShape


class GraphRunner:
    """Runs one computation, and owns its graphs. A target model and a draft model each have one.

    Args:
        computation: What to run; knows model, buffers and state.
        platform: The device.
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
        self.computation = computation
        self.platform = platform
        self.buckets = buckets
        self.requested = plan
        self.verify = verify
        self._agreement = agreement
        query_lens = tuple(query_lens)
        if not may_capture(plan, platform):
            used = {}
        elif used is None:
            asked = [phase for phase in PHASES if plan.of(phase) != "none"]
            used = {each: uses_of_phase(computation, each, query_lens) for each in asked}
        error = largest_error(each for uses in used.values() for _, each in uses)
        self.exact = error is None
        """Eager execution repeats itself to the bit; known where anything may be captured."""
        self.plan: GraphPlan[Executor] = plan_for(used, platform, plan, query_lens)
        self.bucket_graphs = BucketGraphs(buckets)
        self.guard = Guard(computation)
        self.canary = CanaryPolicy(verify)
        self.ledger = Ledger(computation.facts)
        pool = GraphPool(platform) if pool is None else pool
        self.capturer = Capturer(computation, platform, agreement, pool)
        self.judge = Judge(computation, platform, self.capturer, self.guard, agreement, error)
        self.useless = Useless(computation, platform, agreement)
        self.prover = Prover(
            computation, self.capturer, self.judge, self.ledger, self.guard, self.useless, agreement
        )
        self.replays = Replays(
            computation, platform, self.canary, self.capturer, self.judge, self.ledger,
            self.guard, agreement, self.bucket_graphs,
        )  # fmt: skip
        idle = IdleProof(self.prover, self.judge, self.replays, agreement, self.bucket_graphs)
        self.captures = Captures(
            computation, platform, self.plan, buckets.shapes(self.plan, query_lens, max_requests),
            self.bucket_graphs, self.capturer, self.prover, self.useless, idle, self.replays,
            self.guard, self.ledger, self.canary, verify, agreement, owner=owner, lazy=lazy,
        )  # fmt: skip
        self._deferred = self.captures.deferred
        self._result: tuple[StepShape, Tensor] | None = None
        """The shape of the last step, and its first output."""
        self.ran = EAGERLY
        """How the last step was computed."""
        self._eager_steps = 0
        self._unproven_eager = 0

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
        bucket = self.bucket_graphs.holding(whole)
        if bucket is None or bucket.graph is None:
            if bucket is not None and self._deferred:
                self._deferred.note(bucket.shape)
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

    def padded(self, shape: StepShape, at_least: StepShape | None = None) -> StepShape:
        """What :meth:`run` pads a step to: its bucket, or nothing more than ``at_least`` if none
        holds it."""
        whole = shape if at_least is None else shape.holding(at_least)
        bucket = self.bucket_graphs.holding(whole)
        return whole if bucket is None or bucket.graph is None else bucket.shape

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
            assert kind is not None
            if not self.ledger.trusts(bucket.key, kind):
                unproven = kind
        meets = unproven is not None
        """The step is of an unproven kind on some rank."""
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
        captures = self.captures
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
            memory=captures.memory,
            capture_seconds=captures.capture_seconds,
            verify_seconds=captures.verify_seconds,
            blind_inputs=told(captures.blind),
        )  # fmt: skip
