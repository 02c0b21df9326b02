"""Replays of live steps: seen or unseen, and what follows if one is wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch

from reprise.distributed import Agreement
from reprise.errors import GraphReplayError, describe
from reprise.graphs.canary import CanaryPolicy
from reprise.graphs.capture import BucketGraph, Capturer, Key
from reprise.graphs.contract import Computation
from reprise.graphs.guard import Guard, Scope
from reprise.graphs.judge import Judge, note_times
from reprise.graphs.kinds import Kind
from reprise.graphs.mend import mend
from reprise.graphs.outcome import EAGERLY, Damage, Ran
from reprise.graphs.repair import make_good
from reprise.graphs.trust import Ledger
from reprise.graphs.verdict import Verdict
from reprise.graphs.verify import examine
from reprise.platforms import Platform
from reprise.shape import StepShape

logger = logging.getLogger(__name__)


class Replays:
    """Replays graphs of one computation, and refuses each that is found wrong.

    Args:
        computation: Whose steps they are.
        platform: The device.
        policy: When to compare, which a refusal hurries.
        capturer: Has the compiled model, and takes a refused graph out of use.
        judge: Says where a graph is wrong.
        ledger: Of what is proven.
        guard: Of the computation's memory.
        agreement: Of the ranks that compute together.
        buckets: All graphs, for the siblings of one.
    """

    def __init__(
        self,
        computation: Computation,
        platform: Platform,
        policy: CanaryPolicy,
        capturer: Capturer,
        judge: Judge,
        ledger: Ledger,
        guard: Guard,
        agreement: Agreement,
        buckets: Mapping[Key, BucketGraph],
    ) -> None:
        self._computation = computation
        self._platform = platform
        self._policy = policy
        self._capturer = capturer
        self._judge = judge
        self._ledger = ledger
        self._guard = guard
        self._agreement, self._agree = agreement, agreement.all
        self._buckets = buckets
        self.alone = True
        """Nothing else writes the caches between two steps."""
        self.may_lose_steps = agreement.size == 1
        """A step without a result is computed again, which several ranks could not tell alike."""
        self.failures = 0
        """Graphs that comparisons have found wrong."""
        self.damage: Damage | None = None
        """What the last refused graph has left behind; it is taken away when it is repaired."""
        self._unseen: dict[Key, int] = {}
        """Replays of each graph since it was last found right."""
        self._replayed: dict[Key, Ran] = {}
        self._turn = 0
        self.interrupted: BucketGraph | None = None
        """What this graph may have changed was not looked at to the end: its replay was being
        looked at, or made good, when something else came between. :meth:`settle` comes next."""

    def settle(self, *, everything: bool = False) -> None:
        """See to the weights, if a look at a replay was cut short, as by Ctrl-C: what else it may
        have changed is made anew for the next request, or put back.

        Args:
            everything: See to them in any case.

        Raises:
            WeightsLostError: They were changed and cannot be loaded again.
        """
        bucket = self.interrupted
        if bucket is None and not (everything and self._guard.knows_weights):
            return
        with self._computation.ops.computing():
            wrong = self._guard.wrong_weights()
            if wrong and bucket is not None and bucket.graph is not None:
                self._refuse(bucket, f"it changed {', '.join(wrong)}", frozenset(), earlier=True)
            mend(self._computation, self._guard, wrong)
        self.interrupted = None

    def replay(self, bucket: BucketGraph) -> Ran:
        """Compute the step unseen.

        Raises:
            GraphReplayError: The replay failed, and the graph is refused.
        """
        assert bucket.graph is not None
        self._guard.forget()
        self._unseen[bucket.key] = self._unseen.get(bucket.key, 0) + 1
        ran = self._replayed.get(bucket.key)
        if ran is None:
            ran = self._replayed[bucket.key] = Ran(bucket.key, proven=False)
        try:
            bucket.graph.replay()
        except Exception as error:
            reason = f"replay: {describe(error)}"
            self._refuse(bucket, reason, frozenset())
            self.interrupted = bucket
            self._guard.settle_ops()
            raise GraphReplayError(f"graph {bucket.info.name}: {reason}") from error
        return ran

    def compare(
        self, bucket: BucketGraph, shape: StepShape, unproven: Kind | None, *, meets: bool
    ) -> Ran | None:
        """Compute eagerly, replay, compare; the eager results are what the caller gets.

        A canary is to see what replays are that are not compared, and some would be right behind
        eager execution alone; others would be as wrong as eager execution that reads what they have
        changed. So every other step that the graph is trusted with is replayed first, unless every
        step is compared: then none is right by chance, and eager execution goes before all.

        Args:
            bucket: Whose graph.
            shape: The step, without padding.
            unproven: Its kind, if the graph is not trusted with it.
            meets: Some rank's is not.

        Returns:
            How the step was computed; None: it was not, memory is short.

        Raises:
            GraphReplayError: The graph has changed the eager results as well, and is refused.
            WeightsLostError: The graph has changed weights that cannot be loaded again.
        """
        assert bucket.graph is not None
        if not self.alone:
            self._guard.forget()
        self._platform.synchronize()  # what was submitted before is not the canary's time
        began = time.perf_counter()
        bucket.info.canaries += 1
        computation, bounds, executor = self._computation, self._judge.bounds, bucket.info.executor
        model, bound = computation.model, bounds.of(executor)
        if computation.follow is not None:
            # What it draws is compared, too; that compiled code is right, start-up has shown.
            model, bound = self._capturer.model(executor), bounds.inexact
        cold = (
            self.may_lose_steps
            and not (meets or self._policy.checks_everything)
            and self._policy.replays_first(bucket)
        )
        # Captured behind start-up; canaries are spaced by what a replay takes.
        timed = not bucket.info.replay_seconds
        self.interrupted = bucket  # until all is seen to
        try:
            verdict = examine(
                computation, self._guard, bucket.graph, bucket.shape, shape, model,
                self.scope(bucket), bound=bound, keep=True, cold=cold,
                timed_on=self._platform if timed else None,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            if self._agreement.size > 1:
                raise  # others wait in a collective that this rank did not come to
            logger.warning(
                "graph %s: a canary lacks memory and its step runs eagerly: %s",
                bucket.info.name, describe(error),
            )  # fmt: skip
            self.interrupted = None  # nothing was replayed
            return None
        seconds = self._agreement.largest(time.perf_counter() - began)
        bucket.info.check_seconds += (seconds - bucket.info.check_seconds) / 2
        if meets:
            self._policy.met(bucket, seconds)
        if verdict.error is not None:
            self._agreement.fell_out(f"a canary of graph {bucket.info.name}: {verdict.error}")
        if self._agree(verdict.right):
            self._unseen[bucket.key] = 0
            if timed:
                note_times(bucket, verdict.times)
                self._judge.agree_on_times(bucket)
            if unproven is not None and not verdict.blind:
                met = computation.kind(shape, bucket.shape, exact=True)
                if met is not None:
                    self._ledger.prove(bucket.key, met, "live")
            self.interrupted = None
            return Ran(bucket.key, proven=True, first=unproven is not None)
        if self.make_good(bucket, shape, verdict, "canary"):
            raise GraphReplayError(f"graph {bucket.info.name} has changed what its canary keeps")
        return EAGERLY

    def scope(self, bucket: BucketGraph) -> Scope:
        """Of the step in the inputs, the memory to check this time."""
        if self._policy.checks_everything:
            return Scope()
        self._turn += 1
        return self._guard.part(self._computation.state(bucket.shape).near(), self._turn)

    def captured(self, bucket: BucketGraph, verdict: Verdict) -> None:
        """Heed what a capture did while requests have memory: if it did not leave that alone, on
        any rank, its graph is refused, and the rest is as of :meth:`make_good`."""
        if not self._agree(verdict.right):
            self.make_good(bucket, bucket.shape.empty, verdict, "capture")

    def make_good(
        self, bucket: BucketGraph, shape: StepShape, verdict: Verdict, found_by: str
    ) -> bool:
        """Refuse a graph that was found wrong, and repair what it did. Returns whether the step is
        lost: there is no eager result that could be trusted.

        Args:
            bucket: The graph's.
            shape: The step in the inputs, without padding.
            verdict: About it.
            found_by: For people.

        Raises:
            WeightsLostError: The graph has changed weights that cannot be loaded again.
            Exception: It cannot be made good; the graph is refused all the same.
        """
        self.interrupted = bucket  # until all is seen to
        self.failures += 1
        try:
            harm = make_good(
                self._computation, self._guard, self._judge, bucket, shape, verdict, self._agree
            )
            # Others may have changed weights that were not looked at.
            earlier = harm.earlier or (harm.weights and not self._policy.checks_everything)
            if self._agreement.size > 1:  # what it did to others' caches, this rank cannot tell
                earlier = not self._agree(not earlier and not harm.units)
            wrong = frozenset(each.tensor for each in verdict.differences) | harm.changed
            told = f"{found_by}: {harm.told}"
            self._refuse(bucket, told, harm.units, earlier=earlier, wrong=wrong)
            if harm.lost:
                self._guard.settle_ops()
        except BaseException:  # whatever is left as it is, this graph is not replayed again
            if bucket.graph is not None:
                self._refuse(bucket, f"{found_by}: {verdict.told}", frozenset(), earlier=True)
            raise
        self.interrupted = None
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
        self._capturer.quarantine(bucket, bucket.info.executor, reason)
        self._ledger.leave(bucket.key)
        siblings = [e for e in self._buckets.values() if e.graph is not None and e.family == family]
        self._policy.hurry(siblings)
        earlier = earlier or unseen > 0
        self.damage = Damage(bucket.key, bucket.info.name, units, earlier, wrong)
