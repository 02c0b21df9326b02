"""The graph runners of one engine, as one: a target's, and those of what drafts for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

from reprise.graphs.capture import Progress
from reprise.graphs.idle import nobody
from reprise.graphs.memory import predict
from reprise.graphs.outcome import Damage
from reprise.graphs.report import GraphMemory, GraphReport
from reprise.graphs.runner import GraphRunner

logger = logging.getLogger(__name__)


class GraphOwners:
    """Runners that compute in turn, over the same caches and in the same pool.

    Args:
        runners: By what their computations are called; the first is the target's.
    """

    def __init__(self, runners: Mapping[str, GraphRunner]) -> None:
        self.runners = runners
        self._lazy = [each for each in runners.values() if each.captures.lazy]
        # A draft's ranks may have nothing to agree on, and be some of several all the same.
        may_lose_steps = all(each.replays.may_lose_steps for each in runners.values())
        for each in runners.values():
            each.replays.alone = len(runners) == 1
            each.replays.may_lose_steps = may_lose_steps

    def __iter__(self) -> Iterator[tuple[str, GraphRunner]]:
        return iter(self.runners.items())

    @property
    def num_graphs(self) -> int:
        """Buckets that have one, or had."""
        return sum(len(each.bucket_graphs) for each in self.runners.values())

    def predict(self) -> int:
        """Bytes to keep free for graphs, see :func:`reprise.graphs.predict`."""
        self.learn_weights()
        try:
            return sum(
                predict(each.captures, keep=True).predicted or 0 for each in self.runners.values()
            )
        finally:
            for each in self.runners.values():
                each.captures.discard()

    def learn_weights(self) -> None:
        """See :meth:`Captures.learn_weights`, of all owners: a graph of one may change what
        another reads."""
        for each in self.runners.values():
            each.captures.learn_weights()

    def comparison_bytes(self) -> int:
        """Bytes to keep free for comparisons, of which one is made at a time."""
        return max(each.captures.comparison_bytes() for each in self.runners.values())

    def capture_all(self, progress: Progress | None = None) -> None:
        """See :meth:`Captures.capture_all`."""
        self.learn_weights()
        for each in self.runners.values():
            each.captures.capture_all(progress)

    def capture_wanted(self) -> bool:
        """See :meth:`Captures.capture_wanted`, of one owner."""
        for each in self._lazy:
            if each.captures.deferred.due:
                return each.captures.capture_wanted()
        return False

    def settle(self, *, everything: bool = False) -> None:
        """See :meth:`Replays.settle`, of all owners."""
        for each in self.runners.values():
            if everything or each.replays.interrupted is not None:
                each.replays.settle(everything=everything)

    def settle_ops(self) -> None:
        """See :meth:`Guard.settle_ops`, of all owners: they share what ops keep."""
        for each in self.runners.values():
            each.guard.settle_ops()

    def caches_changed(self) -> None:
        """See :meth:`GraphRunner.caches_changed`."""
        for each in self.runners.values():
            each.caches_changed()

    def weights_changed(self) -> None:
        """See :meth:`Captures.weights_changed`."""
        for each in self.runners.values():
            each.captures.weights_changed()

    def prove_more(self, wanted: Callable[[], bool] = nobody) -> bool:
        """See :meth:`Captures.prove_more`, of the owners that have something left."""
        self.settle()
        self.caches_changed()  # by probes of another's
        return any(each.captures.prove_more(wanted) for each in self.runners.values())

    @property
    def damaged(self) -> bool:
        """A graph was refused, and what it has left behind is yet to be repaired."""
        return any(each.replays.damage is not None for each in self.runners.values())

    def take_damages(self) -> list[tuple[str, Damage]]:
        """What graphs have left behind in the last step, and whose they are."""
        found = []
        for name, each in self.runners.items():
            replays = each.replays
            if replays.damage is not None:
                found.append((name, replays.damage))
                replays.damage = None
        return found

    def report(self) -> GraphReport:
        """One report of all owners; the plan is the target's."""
        names, reports = list(self.runners), [each.report() for each in self.runners.values()]
        first = reports[0]
        if len(reports) == 1:
            return first
        known = [each.memory for each in reports]
        predicted = [each.predicted for each in known if each.predicted is not None]
        actual = [each.actual for each in known if each.actual is not None]
        return replace(
            first,
            downgrades=[
                {**each, "phase": f"{name} {each['phase']}"} if number else each
                for number, (name, report) in enumerate(zip(names, reports, strict=True))
                for each in report.downgrades
            ],
            graphs=list(chain.from_iterable(each.graphs for each in reports)),
            eager_steps=sum(each.eager_steps for each in reports),
            canaries=sum(each.canaries for each in reports),
            canary_failures=sum(each.canary_failures for each in reports),
            unproven_eager=sum(each.unproven_eager for each in reports),
            bounds={k: max(e.bounds.get(k, 0.0) for e in reports)
                    for k in chain.from_iterable(e.bounds for e in reports)},
            memory=GraphMemory(
                sum(predicted) if predicted else None,
                sum(actual) if actual else None,
                "; ".join(dict.fromkeys(each.note for each in known if each.note)),
                any(each.failed for each in known),
            ),
            capture_seconds=sum(each.capture_seconds for each in reports),
            verify_seconds=sum(each.verify_seconds for each in reports),
            blind_inputs=[
                f"{name}: {each}" if number else each
                for number, (name, report) in enumerate(zip(names, reports, strict=True))
                for each in report.blind_inputs
            ],
        )  # fmt: skip
