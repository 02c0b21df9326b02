"""Proof of graphs at start-up: each bucket on what concerns it alone, anchors on everything."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from reprise.distributed import Agreement
from reprise.errors import describe
from reprise.graphs.capture import BucketGraph, Capturer, Progress
from reprise.graphs.contract import Computation, Probe
from reprise.graphs.guard import Guard
from reprise.graphs.judge import Judge, note_times
from reprise.graphs.mend import mend
from reprise.graphs.plan import FALLBACK, Executor
from reprise.graphs.trust import Ledger
from reprise.graphs.useless import Useless
from reprise.graphs.verify import Later

logger = logging.getLogger(__name__)

VERIFY_SHARE = 0.25
VERIFY_SECONDS = 1.5
"""Verification may take this share of capture time, or so many seconds if that is longer. Every
graph gets its first probe in any case; what is left out is met by live steps."""
LOCATE_AT_MOST = 2
"""Graphs of one phase and executor whose fault is traced to its op; the rest fail alike."""


class Prover:
    """Chooses on what graphs are proven, and refuses those that are wrong.

    Args:
        computation: What was captured.
        capturer: Captures the fallback of a refused graph.
        judge: Says whether a graph is right.
        ledger: Takes down what was proven.
        guard: Of the computation's memory.
        useless: Graphs that gain nothing, which need no proof.
        agreement: Of the ranks that compute together.
    """

    def __init__(
        self,
        computation: Computation,
        capturer: Capturer,
        judge: Judge,
        ledger: Ledger,
        guard: Guard,
        useless: Useless,
        agreement: Agreement,
    ) -> None:
        self._computation = computation
        self._capturer = capturer
        self._judge = judge
        self._ledger = ledger
        self._guard = guard
        self._useless = useless
        self._agree = agreement.all
        self._buckets: Sequence[BucketGraph] = ()
        """All that start-up proves."""
        self._located: Counter[Hashable] = Counter()
        self._under_way: tuple[BucketGraph, int, Later, float] | None = None
        """A comparison of a probe that has been submitted, and the seconds that took. It has its
        verdict while the next one is prepared."""
        self._blind = False
        """Of the last comparison; see :attr:`Verdict.blind`."""
        self.least_seconds = VERIFY_SECONDS
        """Start-up has so much time for probes, at least."""

    def prove(
        self, buckets: list[BucketGraph], capture_seconds: float, progress: Progress | None
    ) -> None:
        """Probe every graph; one that fails is replaced by its fallback and probed again."""
        started = time.perf_counter()
        budget = max(self.least_seconds, VERIFY_SHARE * capture_seconds)
        self._buckets = buckets
        self.begin(buckets)
        # Small ones first: what gains nothing at one size gains nothing at any above it.
        for done, bucket in enumerate(sorted(buckets, key=lambda each: each.shape.num_tokens)):
            if self._useless.found is None or bucket.shape.phase != "mixed":
                for number, probe in enumerate(bucket.probes):
                    if number == 0 or probe.always:
                        self._advance(bucket, number)
            if progress is not None:
                progress("verify graphs", done + 1, len(buckets))
        self._settle()
        self._useless.drop(buckets, self._ledger)
        self._plan(buckets)
        self._meet_others(buckets, started + budget)
        self._settle()
        self._find_spoilers(buckets)
        for each in buckets:
            self._judge.agree_on_times(each)
        self.conclude(buckets)

    def discard(self) -> None:
        """All graphs are thrown away, and what is known of them."""
        self._under_way, self._buckets = None, ()
        self._located.clear()
        self._useless.forget()

    def _meet_others(self, buckets: list[BucketGraph], deadline: float) -> None:
        """Every further probe that there is time for.

        In rounds, so that each graph soon has what only it can prove, such as padding, which most
        steps have: the many probes of a few anchors are of less. In a round anchors come first:
        what they lack, their whole family lacks.
        """
        first = sorted(buckets, key=lambda each: not self._ledger.is_anchor(each.key))
        for number in range(1, max((len(each.probes) for each in buckets), default=0)):
            for bucket in first:
                unmet = bucket.info.probes <= number < len(bucket.probes)
                if unmet and bucket.graph is not None:
                    left = deadline - time.perf_counter()
                    if self._agree(bucket.info.check_seconds < left):
                        self._advance(bucket, number)

    def _advance(self, bucket: BucketGraph, number: int) -> None:
        """Submit a comparison, then heed the verdict of the one that was submitted before."""
        if bucket.graph is None or not bucket.probes:
            self._settle()
            return
        began = time.perf_counter()
        graph = bucket.graph
        first = number == 0
        behind = self._judge.run_first(self.other(bucket, number)).ran
        later = self._judge.compare_later(
            bucket, bucket.probes[number], timed=first, cold=first, behind=behind
        )
        submitted = time.perf_counter() - began
        self._settle()
        # A graph that was replaced meanwhile has to meet all its probes, this one too.
        if later is None or bucket.graph is not graph or bucket.info.probes < number:
            self._meet(bucket, number)
        else:
            bucket.info.verify_seconds += submitted
            self._under_way = (bucket, number, later, submitted)

    def _settle(self) -> None:
        """Heed the verdict of the comparison under way."""
        if self._under_way is None:
            return
        bucket, number, later, submitted = self._under_way
        self._under_way = None
        if self._agree(later.right()):
            bucket.info.probes = number + 1
            self.met(bucket, bucket.probes[number], blind=later.blind)
            if number == 0:
                note_times(bucket, later.times())
                bucket.info.check_seconds = submitted + bucket.info.replay_seconds
                self._useless.look_at(bucket)
            return
        graph = bucket.graph
        self._meet(bucket, number)  # again, to say what is wrong
        if bucket.graph is graph and graph is not None:
            # What is wrong every second time is wrong now, and can be traced.
            reason = self._probe(bucket, number, timed=False)
            name = bucket.probes[number].name
            self._replace(bucket, reason or f"probe {name!r}: wrong now and then")
            self._meet(bucket, number)

    def met(self, bucket: BucketGraph, probe: Probe, *, blind: bool) -> None:
        """The graph was right on a probe, whose results say something of that or nothing."""
        if blind:
            bucket.blind = True
        elif probe.kind is not None:
            self._ledger.prove(bucket.key, probe.kind, "start")

    def begin(self, buckets: list[BucketGraph]) -> None:
        """Choose probes, measure bounds. The weights have been taken down."""
        for bucket in buckets:
            bucket.probes = self._probes_of(bucket, anchor=False)
        self._judge.bounds.measure(buckets)

    def _probes_of(self, bucket: BucketGraph, *, anchor: bool) -> list[Probe]:
        """None if they cannot be made: the graph is then proven by live steps alone."""
        try:
            return list(self._computation.probes(bucket.shape, anchor=anchor))
        except Exception as error:
            logger.warning("graph %s has no probes: %s", bucket.info.name, describe(error))
            return []

    def _plan(self, buckets: list[BucketGraph]) -> None:
        """Choose the anchors of each family: they meet all kinds of rows."""
        families: dict[Hashable, list[BucketGraph]] = defaultdict(list)
        for bucket in buckets:
            if bucket.graph is not None:
                families[bucket.family].append(bucket)
        anchors: set[Hashable] = set()
        for family in families.values():
            ordered = sorted(family, key=lambda each: each.shape.size)
            anchors |= {ordered[i].key for i in (0, len(ordered) // 2, -1)}
        for bucket in buckets:
            if bucket.key in anchors:
                bucket.probes = self._probes_of(bucket, anchor=True)
            bucket.info.planned_probes = len(bucket.probes)
            if bucket.key in anchors:
                kinds = [each.kind for each in bucket.probes if each.kind is not None]
                self._ledger.plan(bucket.key, kinds)

    def plan_later(self, bucket: BucketGraph) -> None:
        """The bucket was captured behind start-up: live steps prove it, and its probes when nothing
        runs. Its family has its anchors."""
        bucket.probes = self._probes_of(bucket, anchor=False)
        bucket.info.planned_probes, bucket.later = len(bucket.probes), True

    def _meet(self, bucket: BucketGraph, number: int) -> None:
        """Prove the graph on the bucket's next probe; a fallback has to pass earlier ones too."""
        started = time.perf_counter()
        while bucket.graph is not None:
            failed = None
            for each in range(bucket.info.probes, min(number + 1, len(bucket.probes))):
                failed = self._probe(bucket, each, timed=each == 0)
                if failed is not None:
                    break
                if each == 0:
                    self._useless.look_at(bucket)
                bucket.info.probes += 1
                self.met(bucket, bucket.probes[each], blind=self._blind)
            if failed is None:
                break
            self._replace(bucket, failed)
        bucket.info.verify_seconds += time.perf_counter() - started

    def capture_unproven(self, bucket: BucketGraph, executor: Executor) -> None:
        """Give the bucket a graph of which nothing is known yet."""
        self._ledger.leave(bucket.key)
        self._capturer.capture_or_fall_back(bucket, executor)
        if bucket.graph is not None:
            self._ledger.enter(bucket.key, bucket.family)

    def _replace(self, bucket: BucketGraph, reason: str) -> None:
        """Refuse the bucket's graph; the next executor that can be captured takes over."""
        executor = bucket.info.executor
        self._capturer.quarantine(bucket, executor, reason)
        bucket.info.probes = 0
        self.capture_unproven(bucket, FALLBACK[executor])

    def other(self, bucket: BucketGraph, number: int) -> BucketGraph | None:
        """Another graph, to be replayed before the bucket's is compared on the probe of that
        number: on the first one that needs time, one of the other phase that is right by then."""
        first = next((n for n, each in enumerate(bucket.probes) if n and not each.always), None)
        if number != first:
            return None
        others = (
            each
            for each in self._buckets
            if each.graph is not None
            and each.info.probes
            and each.probes
            and each.shape.phase != bucket.shape.phase
        )
        return min(others, key=lambda each: each.shape.num_tokens, default=None)

    def _probe(self, bucket: BucketGraph, number: int, *, timed: bool) -> str | None:
        """Why the bucket's graph is wrong on the probe of that number; None: it is right."""
        began, probe = time.perf_counter(), bucket.probes[number]
        behind = self._judge.run_first(self.other(bucket, number)).ran
        verdict = self._judge.compare(bucket, probe, timed=timed, cold=number == 0, behind=behind)
        bucket.info.check_seconds = time.perf_counter() - began
        self._blind = verdict.blind
        if not verdict.ran:
            return f"probe {probe.name!r}: {verdict.told}"
        if self._agree(verdict.right):
            return None
        where = ""
        if self._located[bucket.family] < LOCATE_AT_MOST:
            self._located[bucket.family] += 1
            where = self._judge.where(bucket, probe.live, probe.fill)
        return f"probe {probe.name!r}: {verdict.told or 'wrong on another rank'}{where}"

    def _find_spoilers(self, buckets: list[BucketGraph]) -> None:
        """If weights have changed since verification began, refuse the graphs that change them."""
        wrong = self._guard.wrong_weights()
        if self._agree(not wrong):
            return
        logger.warning("graphs have changed weights: %s", ", ".join(wrong))
        for bucket in buckets:
            while bucket.graph is not None and bucket.probes:
                reason = self._spoils(bucket)
                if self._agree(reason is None):
                    break
                self._replace(bucket, reason or "wrong on another rank")
                # All that counts has to be proven again, on the fallback.
                self._meet(bucket, 0)
        # What graphs have changed that were refused for something else.
        mend(self._computation, self._guard)

    def _spoils(self, bucket: BucketGraph) -> str | None:
        """Why the graph may not run: the weights that its probes change. They are right after."""
        mend(self._computation, self._guard)
        for probe in bucket.probes[: bucket.info.probes]:
            probe.fill()
            before = self._computation.state(bucket.shape)
            rows = before.read()
            assert bucket.graph is not None
            bucket.graph.replay()
            before.write(rows)
        wrong = self._guard.wrong_weights()
        mend(self._computation, self._guard, wrong)
        return f"it changed {', '.join(wrong)}, which nothing may change" if wrong else None

    def lacking(
        self, buckets: list[BucketGraph], seconds: float
    ) -> tuple[BucketGraph, Probe] | None:
        """A planned probe that time did not allow, of a graph that is compared in so many seconds:
        in rounds as at start."""
        some = [
            each
            for each in buckets
            if each.graph is not None and (each.later or each.info.probes)
            and each.info.probes < len(each.probes)
            and each.info.check_seconds <= seconds
        ]  # fmt: skip
        if not some:
            return None
        best = min(some, key=lambda e: (e.info.probes, not self._ledger.is_anchor(e.key)))
        return best, best.probes[best.info.probes]

    def conclude(self, buckets: list[BucketGraph]) -> None:
        """A graph is verified if its own probes and those of its family's anchors all ran."""
        lacking = {
            bucket.family
            for bucket in buckets
            if bucket.graph is not None and bucket.info.probes < len(bucket.probes)
            and self._ledger.is_anchor(bucket.key)
        }  # fmt: skip
        for bucket in buckets:
            own = bucket.graph is not None and 0 < len(bucket.probes) == bucket.info.probes
            bucket.info.verified = own and not bucket.blind and bucket.family not in lacking
