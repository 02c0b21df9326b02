"""Comparison of one replay with eager execution: results, and all memory that must stay alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from reprise.errors import GraphError, describe
from reprise.graphs.compare import Compared, copies, differ, difference, poison, poison_memory
from reprise.graphs.contract import Computation
from reprise.graphs.guard import SUMMED, Change, Guard, Scope
from reprise.graphs.informative import extremes, uninformative
from reprise.graphs.seal import Seal
from reprise.graphs.segments import SegmentedGraph
from reprise.graphs.step_memory import StepMemory, Values
from reprise.graphs.stopwatch import Stopwatch, Times
from reprise.graphs.verdict import Verdict
from reprise.platforms import Platform
from reprise.shape import StepShape


class BrokenOff(BaseException):
    """A comparison is given up, before anything was replayed. No Exception: it says nothing of the
    graph."""


def go_on() -> None:
    """Never break a comparison off."""


COPIES = 3
"""Of the rows that a step writes: before it, behind eager execution and behind the replay."""


def examine(
    computation: Computation,
    guard: Guard,
    graph: SegmentedGraph,
    bucket: StepShape,
    live: StepShape,
    model: Callable[..., Any],
    scope: Scope,
    *,
    bound: float | None,
    pool: Sequence[Tensor] = (),
    keep: bool,
    timed_on: Platform | None = None,
    cold: bool = False,
    twice: bool = False,
    go_on: Callable[[], None] = go_on,
) -> Verdict:
    """Compute the step that the static inputs hold, eagerly and then by replay, and compare.

    Eager execution comes first, on state that no replay has touched; what a step updates in place
    is put back between the two, but for rows of the caches that it writes whatever is there: these
    hold other bits. So what a graph does not write shows, also where it is there already, as behind
    a request that was computed before; outputs start from different garbage.
    Inputs and memory beside are as before afterwards, whatever the replay did to them, unless the
    verdict is ``lost``.

    A graph may live on what eager execution of the same step has left behind, in memory that is in
    no list, such as the plan of a kernel whose work is shared out beforehand, or scratch that is
    cleared there alone. So one comparison of each graph has to be ``cold``, and so has whatever
    asks how replays are that are not compared: scratch may be as another graph has left it.

    Args:
        computation: Its inputs hold a step, padded to the bucket.
        guard: Of its memory.
        graph: To be judged.
        bucket: What the graph was captured for.
        live: The real rows; only these are compared.
        model: What to compare with.
        scope: The memory to check.
        bound: None: compare bits; else see :func:`reprise.graphs.compare.differs`.
        pool: All memory of the graph's pool, to be overwritten before the replay, since a graph
            must not read what it has not written.
        keep: Afterwards outputs and state are those of the eager run; else the state is as before.
        timed_on: The device; None: the runs need not be timed.
        cold: The replay comes first, behind whatever was computed before. If the eager results are
            kept and the replay has changed caches or weights that they would be computed from,
            the verdict is ``lost``. Not where what is drawn is compared within a bound, which
            follows eager execution.
        twice: Of a replay that comes first what counts is a second one.
        go_on: Called before what takes long, up to the replay: what that has done has to be looked
            at. It may raise :class:`BrokenOff`; the state is as before then.
    """
    both = _Both(computation, guard, bucket, live, scope)
    try:
        both.run(
            graph, model, pool, bound, timed_on, sealed=True, cold=cold, twice=twice, keep=keep,
            go_on=go_on,
        )  # fmt: skip
        return both.conclude(bound, keep=keep)
    except BaseException as error:
        lost = both.has_replayed
        try:
            guard.put_back(both.before)  # some of it is written once, at start
        except Exception:
            lost = True
        if not (lost and isinstance(error, Exception)):
            raise
        # What the replay has done to memory of others cannot be known any more.
        return Verdict(error=f"not compared: {describe(error)}", lost=True)


class Later:
    """A comparison under way. What it read is back in place for the work that is submitted next.

    Args:
        both: What was submitted.
        platform: The device.
    """

    def __init__(self, both: _Both, platform: Platform) -> None:
        self._both = both
        self._flag, *self._extremes = (
            torch.empty(
                each.shape, dtype=each.dtype, pin_memory=platform.pins_memory
            ).copy_(each, non_blocking=True)
            for each in (both.flag, *both.extremes)
        )  # fmt: skip
        self._arrived = platform.event()
        self._arrived.record()

    def right(self) -> bool:
        """Wait for the verdict."""
        self._arrived.synchronize()
        return not bool(self._flag)

    @property
    def blind(self) -> bool:
        """After :meth:`right`; see :attr:`Verdict.blind`."""
        return uninformative(self._extremes)

    def times(self) -> Times | None:
        """After :meth:`right`; None: not measured."""
        return self._both.times()


def examine_later(
    computation: Computation,
    guard: Guard,
    graph: SegmentedGraph,
    bucket: StepShape,
    live: StepShape,
    scope: Scope,
    platform: Platform,
    *,
    bound: float | None,
    pool: Sequence[Tensor],
    timed: bool,
    cold: bool = False,
    twice: bool = False,
) -> Later:
    """:func:`examine` without waiting: whether all is right, and no more than that.

    While the device compares, the host can prepare the next comparison.

    Raises:
        Exception: The replay did.
    """
    both = _Both(computation, guard, bucket, live, scope)
    timer = platform if timed else None
    both.run(graph, computation.model, pool, bound, timer, cold=cold, twice=twice)
    guard.put_back(both.before)
    if both.verdict.error is not None:
        raise GraphError(both.verdict.error)
    both.drop_values()
    return Later(both, platform)


class _Both:
    """Eager execution and replay of one step, and what they left behind."""

    def __init__(
        self,
        computation: Computation,
        guard: Guard,
        bucket: StepShape,
        live: StepShape,
        scope: Scope,
    ) -> None:
        self._computation, self._guard, self._bucket = computation, guard, bucket
        self.step = StepMemory(computation, bucket, live)
        guard.learn_ops()
        self.before = guard.before(scope)
        self.verdict = Verdict()
        self.cold = False
        """The replay came first."""
        self.has_replayed = False
        """A replay has begun, or what eager execution has done cannot be put back: what there is
        cannot be gone on from."""
        self._watches: tuple[Stopwatch, Stopwatch] | None = None
        self.expected: Values = {}
        self.got: Values = {}
        """What eager execution and the replay have left in the rows of the step."""
        self._changes: list[Change] | None = None
        """What the replay has changed, if that was asked for before it was put back."""

    def run(
        self,
        graph: SegmentedGraph,
        model: Callable[..., Any],
        pool: Sequence[Tensor],
        bound: float | None,
        platform: Platform | None,
        *,
        sealed: bool = False,
        cold: bool = False,
        twice: bool = False,
        keep: bool = False,
        go_on: Callable[[], None] = go_on,
    ) -> None:
        """Compute both ways; afterwards the state is as before. Timed if there is a platform.

        Args:
            sealed: What is kept is looked at behind the replay, which waits for the device.
            cold: See :func:`examine`.
            twice: See :func:`examine`.
            keep: See :func:`examine`.
            go_on: See :func:`examine`.
        """
        computation, step, verdict = self._computation, self.step, self.verdict
        if platform is not None:
            self._watches = Stopwatch(platform), Stopwatch(platform)
        follow = None if bound is None else computation.follow
        self.cold = cold and follow is None
        at_first = step.state()
        kept: list[Mapping[str, Tensor]] = [at_first, step.written]
        self.outputs = self.replayed = step.outputs
        flags: list[Tensor] = []
        memory: list[tuple[Compared, Compared]] = []
        try:
            go_on()
            if self.cold:
                self._replay(graph, pool, kept, at_first, sealed=sealed, twice=twice)
                if verdict.lost:
                    return
                flags += self._guard.flags(self.before)
                if sealed and torch.stack(flags).any():
                    self._changes = self._guard.changes(self.before)
                # What eager execution reads has to be what it was.
                self._guard.put_back(self.before)
                if keep and any(each.owner in SUMMED for each in self._changes or ()):
                    verdict.changes += self._changes or ()
                    verdict.lost = True
                    return
                if verdict.error is None or keep:
                    self.replayed = copies(step.outputs)
                    self._forward(model, at_first)
                    step.put(at_first)
                    self.got = {**at_first, **self.got}  # some ops have met memory of theirs
            else:
                self._forward(model, at_first)
                self.outputs = copies(step.outputs)
                kept += [self.expected, self.outputs]
                go_on()
                self._replay(graph, pool, kept, at_first, follow, sealed=sealed)
                if verdict.lost:
                    return
                memory += self._guard.pairs(self.before)
            results: Iterable[tuple[Compared, Compared]] = ()
            if verdict.error is None:
                outputs = ((each, self.replayed[k]) for k, each in self.outputs.items())
                results = chain(outputs, step.pairs(self.expected, self.got, bound))
            if bound is None:
                flags += differ(chain(memory, results))  # in as few launches as can be
            else:
                flags += differ(memory) + differ(results, bound)
            self.flag = torch.stack(flags).any()
            self.extremes = extremes(self.outputs.values())
        except BaseException:
            replayed, self.has_replayed = self.has_replayed, True  # unless all is as it was
            self._guard.put_back(self.before)
            step.put(at_first)
            self.has_replayed = replayed
            raise

    def _forward(self, model: Callable[..., Any], at_first: Values) -> None:
        """Compute eagerly."""
        computation, step = self._computation, self.step
        for output in computation.outputs(self._bucket).values():
            output.zero_()
        with self._watches[0] if self._watches else contextlib.nullcontext():
            computation.forward(self._bucket, model)
        step.clear_unread()
        step.meet_new_memory(at_first)
        self._guard.learn_ops()
        self.expected = step.state()

    def _replay(
        self,
        graph: SegmentedGraph,
        pool: Sequence[Tensor],
        kept: Sequence[Mapping[str, Tensor]],
        at_first: Values,
        follow: Callable[..., Any] | None = None,
        *,
        sealed: bool,
        twice: bool = False,
    ) -> None:
        computation, step = self._computation, self.step
        watch = self._watches[1] if self._watches else contextlib.nullcontext()
        step.put(at_first, spoilt=True)
        seal = Seal(self._kept(kept)) if sealed else None
        self.has_replayed = True
        try:
            if twice:
                poison_memory(pool)
                graph.replay()
                step.put(at_first, spoilt=True)
            poison(computation.outputs(self._bucket).values())
            poison_memory(pool)
            with follow(self._bucket) if follow else contextlib.nullcontext(), watch:
                graph.replay()
        except Exception as error:
            self.verdict.error = describe(error)
        if seal is not None and seal.broken():
            self.verdict.lost = True
            return
        step.clear_unread()
        self.got = step.state()
        step.put(at_first)

    def _kept(self, values: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """All that lies in memory of the comparison's own."""
        own = [*self.step.kept(), *self.before.kept()]
        return [*chain(*(each.values() for each in values)), *own]

    def conclude(self, bound: float | None, *, keep: bool) -> Verdict:
        """The verdict, with what differs. See :func:`examine`."""
        verdict, guard = self.verdict, self._guard
        if verdict.lost:
            return verdict
        if verdict.error is not None or self.flag.item():
            self._tell(bound)
            guard.put_back(self.before)
            if keep and self.cold and (wrong := guard.wrong_weights()):
                # Beyond the scope: eager execution has read them.
                verdict.changes += [Change(name, "weight") for name in wrong]
                verdict.lost = True
                return verdict
        verdict.blind = verdict.right and uninformative(self.extremes)
        verdict.times = self.times()
        if keep:
            self._keep_eager()
            if verdict.right:
                guard.carry(self.before, self.step.written)
        return verdict

    def _tell(self, bound: float | None) -> None:
        """What differs, in detail."""
        step = self.step
        if self.verdict.error is None:
            found = [
                difference(name, each, self.replayed[name], bound)
                for name, each in self.outputs.items()
            ]
            found += step.told(self.expected, self.got, bound)
            self.verdict.differences += [each for each in found if each is not None]
        changes = self._changes
        self.verdict.changes += self._guard.changes(self.before) if changes is None else changes

    def times(self) -> Times | None:
        """Once the device is done with both."""
        if self._watches is None or self.verdict.error is not None:
            return None
        eager, replay = self._watches
        return Times(eager.seconds(), replay.seconds(), eager.host)

    def drop_values(self) -> None:
        """Give back the memory of what was compared."""
        self.expected = self.got = self.outputs = self.replayed = {}

    def _keep_eager(self) -> None:
        """Leave what eager execution left."""
        self.step.put(self.expected)
        for name, output in self.step.outputs.items():
            output.copy_(self.outputs[name])
