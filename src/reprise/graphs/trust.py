"""What each graph has been proven on, and whether that suffices for a step."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Literal

import numpy as np

from reprise.graphs.kinds import Facts, Ints, Kind, Pair

Source = Literal["start", "live"]
"""When a fact was proven: on a probe at start-up, or on a step of a caller's."""

_UNKNOWN, _TRUSTED, _DOUBTED = 0, 1, 2


class Ledger:
    """Facts and pairs of facts on which graphs matched eager execution.

    A graph is trusted for a step if all its facts and all pairs of them were proven: two facts of
    the step, two of one row, or one of each. What concerns the step alone must have been proven on
    the graph itself. The rest holds for a family of graphs (same phase, query length and executor)
    once it was proven on its anchors, the smallest, a middle and the largest of them, or on those
    of them that can be asked: a bucket of 8 tokens has no row of 64.

    Args:
        facts: The terms in which steps are described.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._proven: dict[Hashable, dict[Pair, Source]] = {}
        self._family_of: dict[Hashable, Hashable] = {}
        self._anchors: dict[Hashable, list[Hashable]] = {}
        self._planned: dict[Hashable, dict[Pair, set[Hashable]]] = {}
        self._rows: dict[tuple[Hashable, tuple[int, ...]], Ints | None] = {}
        """By graph and facts of the step: of each code whether it is trusted; None: the step's own
        facts are not."""
        self._trusted: dict[Hashable, Kind] = {}
        """By graph, the kind for which it was trusted last: the next step's is often the same."""
        self._told: dict[Hashable, tuple[dict[str, str], int]] = {}
        """By graph, :meth:`known` and :meth:`num_pairs`, which are asked for every second and
        change seldom."""

    def enter(self, graph: Hashable, family: Hashable) -> None:
        """A new graph, of which nothing is known; also instead of one that was refused."""
        self.leave(graph)
        self._told.clear()
        self._family_of[graph] = family
        self._proven[graph] = {}

    def leave(self, graph: Hashable) -> None:
        """The graph runs no more."""
        family = self._family_of.get(graph)
        self._proven.pop(graph, None)
        if family is not None:
            anchors = self._anchors.get(family, [])
            if graph in anchors:
                anchors.remove(graph)
            for asked in self._planned.get(family, {}).values():
                asked.discard(graph)
            self._forget(family)
            del self._family_of[graph]

    def doubt(self, graph: Hashable) -> None:
        """Whatever was proven of the graph may have been hidden: it is proven no more."""
        self._proven[graph].clear()
        self._forget(self._family_of[graph])

    def plan(self, anchor: Hashable, kinds: Iterable[Kind]) -> None:
        """``anchor`` stands for its family; its probes are of these kinds."""
        family = self._family_of[anchor]
        self._anchors.setdefault(family, []).append(anchor)
        planned = self._planned.setdefault(family, {})
        for kind in kinds:
            for pair in self.facts.pairs(kind):
                planned.setdefault(pair, set()).add(anchor)
        self._forget(family)

    def is_anchor(self, graph: Hashable) -> bool:
        """Whether the graph stands for its family."""
        return graph in self._anchors.get(self._family_of.get(graph), ())

    def prove(self, graph: Hashable, kind: Kind, source: Source) -> None:
        """The graph matched eager execution on a step of this kind."""
        proven = self._proven[graph]
        for pair in self.facts.pairs(kind):
            proven.setdefault(pair, source)
        self._forget(self._family_of[graph])

    def trusts(self, graph: Hashable, kind: Kind) -> bool:
        """Whether a step of this kind may be replayed."""
        if self._trusted.get(graph) is kind:
            return True
        if not self._find_out(graph, kind):
            return False
        self._trusted[graph] = kind
        return True

    def _find_out(self, graph: Hashable, kind: Kind) -> bool:
        key = (graph, kind.step)
        if key not in self._rows:
            steps = self.facts.step_pairs(kind.step)
            known = all(self._holds(graph, pair) for pair in steps)
            self._rows[key] = np.zeros(self.facts.num_codes, dtype=np.int8) if known else None
        rows = self._rows[key]
        if rows is None:
            return False
        found = rows[kind.rows]
        if (found == _TRUSTED).all():
            return True
        for code in set(kind.rows[found == _UNKNOWN].tolist()):
            holds = all(self._holds(graph, pair) for pair in self._of_row(kind.step, code))
            rows[code] = _TRUSTED if holds else _DOUBTED
        return bool((rows[kind.rows] == _TRUSTED).all())

    def missing(self, graph: Hashable, kind: Kind) -> list[str]:
        """What was not proven of a step, in words."""
        pairs = sorted(self.facts.pairs(kind))
        return [self.facts.name(pair) for pair in pairs if not self._holds(graph, pair)]

    def known(self, graph: Hashable) -> dict[str, str]:
        """Of every fact by name: ``start``, ``live``, ``family`` (proven on its anchors), or
        ``not yet met``."""
        return self._tell(graph)[0]

    def num_pairs(self, graph: Hashable) -> int:
        """Facts and pairs of facts for which the graph is trusted."""
        return self._tell(graph)[1]

    def _tell(self, graph: Hashable) -> tuple[dict[str, str], int]:
        told = self._told.get(graph)
        if told is None:
            known = {
                name: self._source(graph, (number, number))
                for number, name in enumerate(self.facts.names)
            }
            told = self._told[graph] = known, self._count_pairs(graph)
        return told

    def _count_pairs(self, graph: Hashable) -> int:
        family = self._planned.get(self._family_of.get(graph), {})
        candidates = self._proven.get(graph, {}).keys() | family.keys()
        return sum(self._holds(graph, pair) for pair in candidates)

    def _source(self, graph: Hashable, pair: Pair) -> str:
        own = self._proven.get(graph, {}).get(pair)
        if own is not None:
            return own
        return "family" if self._holds(graph, pair) else "not yet met"

    def _of_row(self, step: tuple[int, ...], code: int) -> Iterable[Pair]:
        yield from self.facts.row_pairs(code)
        yield from self.facts.cross_pairs(step, code)

    def _holds(self, graph: Hashable, pair: Pair) -> bool:
        if pair in self._proven.get(graph, {}):
            return True
        if pair[0] == pair[1] < self.facts.num_step_facts:
            return False  # every bucket must have met it
        family = self._family_of.get(graph)
        asked = self._planned.get(family, {}).get(pair) or self._anchors.get(family)
        return bool(asked) and all(pair in self._proven[each] for each in asked or ())

    def _forget(self, family: Hashable) -> None:
        """What was looked up for graphs of the family."""
        self._trusted.clear()
        self._told.clear()
        for key in [each for each in self._rows if self._family_of.get(each[0]) == family]:
            del self._rows[key]
