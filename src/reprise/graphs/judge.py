"""Graphs compared with eager execution on probes, and the place where one goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reprise.distributed import Agreement
from reprise.errors import describe
from reprise.graphs.alone import run_alone
from reprise.graphs.bounds import Bounds
from reprise.graphs.capture import BucketGraph, Capturer
from reprise.graphs.contract import Computation, Probe
from reprise.graphs.guard import Guard, Scope
from reprise.graphs.locate import Location, locate
from reprise.graphs.padding import compute_padding, write_padding
from reprise.graphs.stopwatch import Times
from reprise.graphs.verdict import Verdict
from reprise.graphs.verify import Later, examine, examine_later, go_on
from reprise.platforms import Platform
from reprise.shape import StepShape

logger = logging.getLogger(__name__)

NO_WEIGHTS = -1


class Judge:
    """Says whether a graph is right. What follows from that is for others.

    Args:
        computation: What was captured.
        platform: The device.
        capturer: Of the graphs.
        guard: Of the computation's memory.
        agreement: Of the ranks that compute together.
        error: None if all ops in use are exact; else the largest declared relative error.
    """

    def __init__(
        self,
        computation: Computation,
        platform: Platform,
        capturer: Capturer,
        guard: Guard,
        agreement: Agreement,
        error: float | None,
    ) -> None:
        self._computation = computation
        self._platform = platform
        self._capturer = capturer
        self._guard = guard
        self._agreement, self._agree = agreement, agreement.all
        self.bounds = Bounds(computation, error)
        """How much graphs may differ."""

    def compare(
        self,
        bucket: BucketGraph,
        probe: Probe,
        *,
        timed: bool = False,
        scope: Callable[[], Scope] | None = None,
        cold: bool = False,
        behind: bool = False,
        go_on: Callable[[], None] = go_on,
    ) -> Verdict:
        """Whether the bucket's graph is right on a probe; the state is as before.

        What the compiler made of the model has to be what was captured, to the bit, and what the
        model says, as far as its roundings go.

        Args:
            bucket: Its graph is judged.
            probe: On what.
            timed: The runs are timed.
            scope: Of the step in the inputs, the memory to check. None: what lies around it.
            cold: Two replays come first, behind eager execution of another step.
            behind: One comes first, behind whatever ran before.
            go_on: As of :func:`reprise.graphs.verify.examine`.
        """
        assert bucket.graph is not None
        executor = bucket.info.executor
        compiled, written = self._capturer.model(executor), self._computation.model
        comparisons = [(compiled, self.bounds.inexact)]
        if compiled is not written:
            comparisons.append((written, self.bounds.of(executor)))
        verdict = Verdict()
        for number, (model, bound) in enumerate(comparisons):
            if number and not self._agree(verdict.right):
                break
            if number:
                cold = behind = False
            go_on()
            reason = self._compute_padding(bucket) if cold else None
            if reason is None:
                pool, reason = self._fill(bucket, probe)
            if reason is not None:
                return Verdict(error=reason, ran=False)
            try:
                verdict = examine(
                    self._computation, self._guard, bucket.graph, bucket.shape, probe.live, model,
                    scope() if scope else self._scope(bucket, wide=timed), bound=bound, pool=pool,
                    keep=False, timed_on=self._platform if timed else None,
                    cold=cold or behind, twice=cold, go_on=go_on,
                )  # fmt: skip
            except torch.OutOfMemoryError as error:
                verdict = Verdict(error=describe(error), ran=False)
            except Exception as error:
                verdict = Verdict(error=describe(error))
            if verdict.error is not None:
                self._fell_out(bucket, verdict.error)
            if not self._agree(verdict.ran):
                told = "it did not run on another rank" if verdict.ran else verdict.error
                return Verdict(error=told, ran=False)
            if timed:
                note_times(bucket, verdict.times)
        return verdict

    def compare_later(
        self, bucket: BucketGraph, probe: Probe, *, timed: bool, cold: bool, behind: bool
    ) -> Later | None:
        """Submit a comparison, whose verdict comes when it is asked for.

        Args:
            bucket: Its graph is judged.
            probe: On what.
            timed: The runs are timed, and more memory is looked at.
            cold: Two replays come first, behind whatever was computed before.
            behind: As of :meth:`compare`.

        Returns:
            It; None: it has to be made step by step.
        """
        executor = bucket.info.executor
        if self._capturer.model(executor) is not self._computation.model:
            return None
        assert bucket.graph is not None
        pool, reason = self._fill(bucket, probe)
        if reason is not None:
            logger.debug("probe %r of %s: %s", probe.name, bucket.info.name, reason)
            return None
        later = None
        try:
            later = examine_later(
                self._computation, self._guard, bucket.graph, bucket.shape, probe.live,
                self._scope(bucket, wide=timed), self._platform,
                bound=self.bounds.of(executor), pool=pool, timed=timed,
                cold=cold or behind, twice=cold,
            )  # fmt: skip
        except Exception as error:
            logger.debug("probe %r of %s: %s", probe.name, bucket.info.name, describe(error))
            self._fell_out(bucket, describe(error))
        return later if self._agree(later is not None) else None

    def agree_on_times(self, bucket: BucketGraph) -> None:
        """What is decided by them later, all ranks decide alike."""
        info, largest = bucket.info, self._agreement.largest
        info.check_seconds = largest(info.check_seconds)
        info.eager_seconds = largest(info.eager_seconds)
        info.replay_seconds = largest(info.replay_seconds)

    def where(self, bucket: BucketGraph, live: StepShape, fill: Callable[[], None]) -> str:
        """``; first diverging op: ...`` of a graph that is wrong on what ``fill`` writes."""
        try:
            location = self.locate(bucket, live, fill)
        except Exception as error:
            # The graph is wrong all the same, and is to be refused.
            return f"; not traced to an op: {describe(error)}"
        return "" if location is None else f"; {location}"

    def locate(
        self, bucket: BucketGraph, live: StepShape, fill: Callable[[], None]
    ) -> Location | None:
        """Where the graph diverges on what ``fill`` writes; raises what the search does."""
        return locate(
            self._computation, self._platform, bucket.shape, live, fill,
            bucket.graph, self._capturer.model(bucket.info.executor), self._agree,
        )  # fmt: skip

    def _fell_out(self, bucket: BucketGraph, error: str) -> None:
        self._agreement.fell_out(f"a probe of graph {bucket.info.name}: {error}")

    def _compute_padding(self, bucket: BucketGraph) -> str | None:
        """Compute another step than the next, since the last comparison may have been of its probe;
        returns why that cannot be done, on any rank."""
        reason = None
        for stage in (write_padding, compute_padding):  # a vote follows each
            try:
                stage(self._computation, bucket.shape)
            except Exception as error:
                reason = f"padding cannot be computed: {describe(error)}"
                self._fell_out(bucket, reason)
            if not self._agree(reason is None):
                return reason or "padding cannot be computed on another rank"
        return None

    def run_first(
        self, bucket: BucketGraph | None, scope: Callable[[], Scope] | None = None
    ) -> Verdict:
        """Replay a graph on its first probe, for what it leaves where several use the same memory.
        The state is as before, whether it ran, and all ranks say the same of that.

        Args:
            bucket: The graph's; None: there is none, and it did not run.
            scope: Of the step in the inputs, the memory that the replay must leave alone. None:
                nothing was left there yet, and a comparison has found the graph right.
        """
        if bucket is None:
            return Verdict(ran=False)
        verdict = Verdict()
        _, reason = self._fill(bucket, bucket.probes[0])
        if reason is not None:
            return Verdict(error=reason, ran=False)
        assert bucket.graph is not None
        try:
            verdict = run_alone(
                self._computation, self._guard, bucket.graph.replay, bucket.shape,
                None if scope is None else scope(),
            )  # fmt: skip
        except Exception as error:
            verdict = Verdict(error=describe(error), ran=False)
        if verdict.error is not None:
            logger.debug("graph %s ran before no other: %s", bucket.info.name, verdict.error)
            self._fell_out(bucket, verdict.error)
        return verdict if self._agree(verdict.ran) else Verdict(error=verdict.error, ran=False)

    def _fill(self, bucket: BucketGraph, probe: Probe) -> tuple[Sequence[Tensor], str | None]:
        """Write the probe into the inputs: all memory of the graph's pool, and why it cannot be
        done, on any rank. One that says no says so before the others wait in a collective."""
        assert bucket.graph is not None
        pool: Sequence[Tensor] = ()
        reason = None
        try:
            probe.fill()
            pool = self._capturer.pool.memory(bucket.graph)
        except Exception as error:
            reason = f"it cannot be made: {describe(error)}"
        if self._agree(reason is None):
            return pool, None
        return (), reason or "it cannot be made: on another rank"

    def _scope(self, bucket: BucketGraph, *, wide: bool) -> Scope:
        """What to check around the step at hand; weights are checked when all probes have run."""
        state = self._computation.state(bucket.shape)
        return Scope(state.near() if wide else state.beside(), NO_WEIGHTS)


def note_times(bucket: BucketGraph, times: Times | None) -> None:
    """Take down how long a step of the bucket takes both ways; None: it was not measured."""
    info = bucket.info
    info.eager_seconds, info.replay_seconds, info.submit_seconds = times or (0.0, 0.0, 0.0)
