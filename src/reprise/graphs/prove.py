"""Proof of graphs at start-up: each bucket on what concerns it alone, anchors on everything."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from reprise.distributed import Agreement
from reprise.errors import WeightsLostError, describe
from reprise.graphs.bounds import Bounds
from reprise.graphs.capture import BucketGraph, Capturer, Progress
from reprise.graphs.compare import same_bits
from reprise.graphs.contract import Computation, Probe
from reprise.graphs.guard import Guard, Scope
from reprise.graphs.locate import Location, locate
from reprise.graphs.plan import FALLBACK, Executor
from reprise.graphs.trust import Ledger
from reprise.graphs.verify import Later, Verdict, examine, examine_later
from reprise.platforms import Platform
from reprise.shape import StepShape

logger = logging.getLogger(__name__)

VERIFY_SHARE = 0.25
VERIFY_SECONDS = 1.5
"""Verification may take this share of capture time, or so many seconds if that is longer. Every
graph gets its first probe in any case; what is left out is met by live steps."""
LOCATE_AT_MOST = 2
"""Graphs of one phase and executor whose fault is traced to its op; the rest fail alike."""
USELESS = 0.85
BUSY_SECONDS = 0.005
"""A graph whose replay takes this share of eager execution's time, and so long, gains nothing:
while the device computes, the host is ahead."""
NO_WEIGHTS = -1


class Prover:
    """Compares graphs with eager execution, refuses those that differ, and says where.

    Args:
        computation: What was captured.
        platform: Where.
        capturer: Captures the fallback of a refused graph.
        ledger: Takes down what was proven.
        guard: Of the computation's memory.
        agreement: Of the ranks that compute together.
        error: None if all ops in use are exact; else the largest declared relative error.
    """

    def __init__(
        self,
        computation: Computation,
        platform: Platform,
        capturer: Capturer,
        ledger: Ledger,
        guard: Guard,
        agreement: Agreement,
        *,
        error: float | None,
    ) -> None:
        self._computation = computation
        self._platform = platform
        self._capturer = capturer
        self.ledger = ledger
        self._guard = guard
        self._agreement = agreement
        self._agree, self._largest = agreement.all, agreement.largest
        self._located: Counter[Hashable] = Counter()
        self._under_way: tuple[BucketGraph, int, Later, float] | None = None
        """A comparison of a probe that has been submitted, and the seconds that took. It has its
        verdict while the next one is prepared."""
        self._useless: BucketGraph | None = None
        """The smallest whose graph gains nothing."""
        self.bounds = Bounds(computation, error)
        """How much graphs may differ."""
        self.least_seconds = 0.0
        """Start-up has so much time for probes, at least."""
        self.keeps_useless = False
        """Graphs that gain nothing are proven and used all the same."""

    # ---- start-up ------------------------------------------------------------------------

    def prove(
        self, buckets: list[BucketGraph], capture_seconds: float, progress: Progress | None
    ) -> None:
        """Probe every graph; one that fails is replaced by its fallback and probed again."""
        started = time.perf_counter()
        budget = max(VERIFY_SECONDS, self.least_seconds, VERIFY_SHARE * capture_seconds)
        self.begin(buckets)
        # Small ones first: what gains nothing at one size gains nothing at any above it.
        for done, bucket in enumerate(sorted(buckets, key=lambda each: each.shape.num_tokens)):
            if self._useless is None or bucket.shape.phase != "mixed":
                for number, probe in enumerate(bucket.probes):
                    if number == 0 or probe.always:
                        self._advance(bucket, number)
            if progress is not None:
                progress("verify graphs", done + 1, len(buckets))
        self._settle()
        self._drop_useless(buckets)
        self._plan(buckets)
        # Anchors first: what they lack, their whole family lacks.
        for anchors in (True, False):
            some = [each for each in buckets if self.ledger.is_anchor(each.key) == anchors]
            self._meet_others(some, started + budget)
        self._settle()
        self._find_spoilers(buckets)
        self._agree_on_times(buckets)
        self.conclude(buckets)

    def _agree_on_times(self, buckets: list[BucketGraph]) -> None:
        """What is decided by them later, all ranks decide alike."""
        for bucket in buckets:
            info = bucket.info
            info.check_seconds = self._largest(info.check_seconds)
            info.eager_seconds = self._largest(info.eager_seconds)
            info.replay_seconds = self._largest(info.replay_seconds)

    def _meet_others(self, buckets: list[BucketGraph], deadline: float) -> None:
        """Every further probe that there is time for."""
        for number in range(1, max((len(each.probes) for each in buckets), default=0)):
            for bucket in buckets:
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
        later = self._submit(bucket, number)
        submitted = time.perf_counter() - began
        self._settle()
        # A graph that was replaced meanwhile has to meet all its probes, this one too.
        if later is None or bucket.graph is not graph or bucket.info.probes < number:
            self._meet(bucket, number)
        else:
            bucket.info.verify_seconds += submitted
            self._under_way = (bucket, number, later, submitted)

    def _submit(self, bucket: BucketGraph, number: int) -> Later | None:
        """Start a comparison; None: it has to be made step by step."""
        executor, probe = bucket.info.executor, bucket.probes[number]
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
                self._scope(bucket, wide=number == 0), self._platform,
                bound=self.bounds.of(executor), pool=pool, timed=number == 0,
            )  # fmt: skip
        except Exception as error:
            logger.debug("probe %r of %s: %s", probe.name, bucket.info.name, describe(error))
            self._fell_out(bucket, describe(error))
        return later if self._agree(later is not None) else None

    def _settle(self) -> None:
        """Heed the verdict of the comparison under way."""
        if self._under_way is None:
            return
        bucket, number, later, submitted = self._under_way
        self._under_way = None
        if self._agree(later.right()):
            bucket.info.probes = number + 1
            self.ledger.prove(bucket.key, bucket.probes[number].kind, "start")
            if number == 0:
                self._note_times(bucket, *later.seconds())
                bucket.info.check_seconds = submitted + bucket.info.replay_seconds
                self._find_useless(bucket)
            return
        graph = bucket.graph
        self._meet(bucket, number)  # again, to say what is wrong
        if bucket.graph is graph and graph is not None:
            # What is wrong every second time is wrong now, and can be traced.
            reason = self._probe(bucket, bucket.probes[number], timed=False)
            name = bucket.probes[number].name
            self._replace(bucket, reason or f"probe {name!r}: wrong now and then")
            self._meet(bucket, number)

    def begin(self, buckets: list[BucketGraph]) -> None:
        """Choose probes, measure bounds. The weights have been taken down."""
        self._guard.learn_ops()
        for bucket in buckets:
            bucket.probes = self._probes_of(bucket, anchor=False)
        self.bounds.measure(buckets)

    @staticmethod
    def _note_times(bucket: BucketGraph, eager: float | None, replay: float | None) -> None:
        bucket.info.eager_seconds, bucket.info.replay_seconds = eager or 0.0, replay or 0.0

    def _find_useless(self, bucket: BucketGraph) -> None:
        """Whether the bucket's graph makes steps no faster: the device is busy for longer than the
        host, which is ahead of it. To prove it would take as long as to prove others."""
        info = bucket.info
        if self.keeps_useless:
            return
        # Without a device of its own there is no other time than the host's.
        if not self._platform.asynchronous or bucket.graph is None or info.phase != "mixed":
            return
        slow = info.replay_seconds >= max(USELESS * info.eager_seconds, BUSY_SECONDS)
        if self._useless is None and self._agree(slow):
            self._useless = bucket

    def _drop_useless(self, buckets: list[BucketGraph]) -> None:
        """Run the steps of graphs that gain nothing eagerly, though nothing is wrong with them."""
        if self._useless is None:
            return
        least = self._useless.info
        reason = (
            f"at {least.bucket} tokens eager execution takes {1e3 * least.eager_seconds:.1f} ms, "
            f"a replay {1e3 * least.replay_seconds:.1f}"
        )
        dropped = []
        for bucket in buckets:
            info = bucket.info
            if bucket.graph is None or info.phase != "mixed" or info.bucket < least.bucket:
                continue
            dropped.append(info.name)
            bucket.graph, info.dropped = None, reason
            info.executor, info.segments, info.breaks = "none", 0, 0
            self.ledger.leave(bucket.key)
        logger.info("graphs that gain nothing are left out: %s (%s)", ", ".join(dropped), reason)

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
                self.ledger.plan(bucket.key, [each.kind for each in bucket.probes])

    def _meet(self, bucket: BucketGraph, number: int) -> None:
        """Prove the graph on the bucket's next probe; a fallback has to pass earlier ones too."""
        started = time.perf_counter()
        while bucket.graph is not None:
            failed = None
            for each in range(bucket.info.probes, min(number + 1, len(bucket.probes))):
                failed = self._probe(bucket, bucket.probes[each], timed=each == 0)
                if failed is not None:
                    break
                if each == 0:
                    self._find_useless(bucket)
                bucket.info.probes += 1
                self.ledger.prove(bucket.key, bucket.probes[each].kind, "start")
            if failed is None:
                break
            self._replace(bucket, failed)
        bucket.info.verify_seconds += time.perf_counter() - started

    def capture_unproven(self, bucket: BucketGraph, executor: Executor) -> None:
        """Give the bucket a graph of which nothing is known yet."""
        self.ledger.leave(bucket.key)
        self._capturer.capture_or_fall_back(bucket, executor)
        if bucket.graph is not None:
            self.ledger.enter(bucket.key, bucket.family)

    def _replace(self, bucket: BucketGraph, reason: str) -> None:
        """Refuse the bucket's graph; the next executor that can be captured takes over."""
        executor = bucket.info.executor
        self._capturer.quarantine(bucket, executor, reason)
        bucket.info.probes = 0
        self.capture_unproven(bucket, FALLBACK[executor])

    def _probe(self, bucket: BucketGraph, probe: Probe, *, timed: bool) -> str | None:
        """Why the bucket's graph is wrong on the probe; None: it is right."""
        began = time.perf_counter()
        verdict = self.compare(bucket, probe, timed=timed)
        bucket.info.check_seconds = time.perf_counter() - began
        if not verdict.ran:
            return f"probe {probe.name!r}: {verdict.told}"
        if self._agree(verdict.right):
            return None
        where = ""
        if self._located[bucket.family] < LOCATE_AT_MOST:
            self._located[bucket.family] += 1
            where = self.where(bucket, probe.live, probe.fill)
        return f"probe {probe.name!r}: {verdict.told or 'wrong on another rank'}{where}"

    def compare(
        self,
        bucket: BucketGraph,
        probe: Probe,
        *,
        timed: bool = False,
        scope: Callable[[], Scope] | None = None,
    ) -> Verdict:
        """Whether the bucket's graph is right on a probe; the state is as before.

        What the compiler made of the model has to be what was captured, to the bit, and what the
        model says, as far as its roundings go.

        Args:
            bucket: Its graph is judged.
            probe: On what.
            timed: The runs are timed.
            scope: Of the step in the inputs, the memory to check. None: what lies around it.
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
            pool, reason = self._fill(bucket, probe)
            if reason is not None:
                return Verdict(error=reason, ran=False)
            try:
                verdict = examine(
                    self._computation, self._guard, bucket.graph, bucket.shape, probe.live, model,
                    scope() if scope else self._scope(bucket, wide=timed), bound=bound, pool=pool,
                    keep=False, timed_on=self._platform if timed else None,
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
                self._note_times(bucket, verdict.eager_seconds, verdict.replay_seconds)
        return verdict

    def _fell_out(self, bucket: BucketGraph, error: str) -> None:
        self._agreement.fell_out(f"a probe of graph {bucket.info.name}: {error}")

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
        self.mend()  # what graphs have changed that were refused for something else

    def _spoils(self, bucket: BucketGraph) -> str | None:
        """Why the graph may not run: the weights that its probes change. They are right after."""
        self.mend()
        for probe in bucket.probes[: bucket.info.probes]:
            probe.fill()
            before = self._computation.state(bucket.shape)
            rows = before.read()
            assert bucket.graph is not None
            bucket.graph.replay()
            before.write(rows)
        wrong = self._guard.wrong_weights()
        self.mend(wrong)
        return f"it changed {', '.join(wrong)}, which nothing may change" if wrong else None

    def mend(self, wrong: Sequence[str] | None = None) -> None:
        """Load damaged weights again.

        Args:
            wrong: Their names; None: find out.

        Raises:
            WeightsLostError: They are not what they were when they were loaded first.
        """
        found = self._guard.wrong_weights() if wrong is None else wrong
        if not found:
            return
        reason, still = "they are wrong after it", found
        try:
            self._computation.mend(found)
            still = self._guard.wrong_weights()
        except Exception as error:
            reason = describe(error)
        if still:
            raise WeightsLostError(
                f"a graph has changed {', '.join(still)} and loading them again did not help "
                f"({reason}): start the engine anew, with graph_mode='none' if it happens again"
            )
        logger.warning("loaded again, since a graph had changed them: %s", ", ".join(found))

    def lacking(
        self, buckets: list[BucketGraph], seconds: float
    ) -> tuple[BucketGraph, Probe] | None:
        """A planned probe that time did not allow, of a graph that is compared in so many seconds;
        those of anchors first, since their whole family lacks them."""
        some = [
            each
            for each in buckets
            if each.graph is not None and 0 < each.info.probes < len(each.probes)
            and each.info.check_seconds <= seconds
        ]  # fmt: skip
        if not some:
            return None
        # Of equals the one with the fewest probes: what is new in it is new in most steps.
        best = min(some, key=lambda e: (not self.ledger.is_anchor(e.key), e.info.probes))
        return best, best.probes[best.info.probes]

    def conclude(self, buckets: list[BucketGraph]) -> None:
        """A graph is verified if its own probes and those of its family's anchors all ran."""
        lacking = {
            bucket.family
            for bucket in buckets
            if bucket.graph is not None and bucket.info.probes < len(bucket.probes)
            and self.ledger.is_anchor(bucket.key)
        }  # fmt: skip
        for bucket in buckets:
            own = bucket.graph is not None and 0 < len(bucket.probes) == bucket.info.probes
            bucket.info.verified = own and bucket.family not in lacking

    # ---- places --------------------------------------------------------------------------

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
            lambda: self._capturer.empty_inputs(bucket.shape), bucket.graph,
            self._capturer.model(bucket.info.executor), self._agree,
        )  # fmt: skip

    def blind_inputs(self, buckets: list[BucketGraph]) -> list[str]:
        """Inputs to which no probe of the phase's first graph gives a new value. Then the phase's
        probes have proven nothing: perhaps they have not arrived, and were all the same step."""
        blind: list[str] = []
        phases: dict[str, bool] = {}
        for bucket in buckets:
            if bucket.shape.phase in phases or bucket.graph is None:
                continue
            self._capturer.empty_inputs(bucket.shape)
            inputs = self._computation.inputs(bucket.shape)
            before = {name: each.clone() for name, each in inputs.items()}
            unchanged = set(before)
            for probe in bucket.probes:
                if not unchanged:
                    break
                with contextlib.suppress(Exception):  # one that time did not allow before
                    probe.fill()
                unchanged -= {n for n in unchanged if not same_bits(before[n], inputs[n])}
            phases[bucket.shape.phase] = bool(unchanged)
            blind += [f"{bucket.shape.phase}: {name}" for name in before if name in unchanged]
        if blind:
            logger.warning(
                "graph probes change no value of: %s; graphs of these phases are not proven, and "
                "live steps are compared or run eagerly", ", ".join(blind),
            )  # fmt: skip
        for bucket in buckets:
            if bucket.graph is not None and phases[bucket.shape.phase]:
                self.ledger.enter(bucket.key, bucket.family)
                bucket.info.verified, bucket.info.probes = False, 0
        return blind
