"""Where a text stands in its grammar, and the same for every text that may go on alike."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from reprise.engine.structured.rules import FINAL, NotFollowed, Rules, in_order, kinds_of
from reprise.errors import describe

logger = logging.getLogger(__name__)

MOST_LOOKED_AT = 2048
"""Places, and rules that begin there, that are looked at to find one state: a millisecond, and a
step has many rows."""
FIND = 32
"""Finding a state takes as long as to look at so many, beside those that it looks at."""
EDGES = 8
"""From its places that take as long as one that is looked at."""
TRIED = 1 << 17
"""That are looked at before anybody asks whether it pays: 60 ms."""
WORTH = 64
"""A token, on average. To fill a mask takes as long, or less."""
MOST_KEPT = 1 << 18
"""That were looked at for the states that are kept; beyond it all are forgotten: some thousands."""
MOST_BEHIND = 1 << 14
"""Bytes of tokens of which is known what comes behind them, all states together: those that come
often come soon."""
BEHIND_BYTES = 150
"""About what each takes."""
KEPT_BYTES = 40
"""About what a state takes for each that was looked at to find it."""
EDGE_BYTES = 160

Place = tuple[int, "Caller"]
"""A state of a rule's finite automaton, and the callers that the rule returns to."""


@dataclass(slots=True, eq=False)
class Caller:
    """The callers of a rule: where they go on when it has matched."""

    places: frozenset[Place]


@dataclass(slots=True, eq=False)
class State:
    """A state of an automaton. What may follow is a function of it; two that are different may
    allow the same."""

    places: frozenset[Place]
    complete: bool
    """The text may end here."""
    terminated: bool
    """The text has ended: nothing may follow."""
    after: dict[int, State | None]
    """Behind a byte of some kind; None: no text goes on like this."""
    behind: dict[bytes, State] = field(default_factory=dict)
    """Behind the bytes of a token, by their kinds, which many tokens have in common."""


class Automaton:
    """Follows texts of a grammar, byte by byte, through states that are found when a text comes to
    them first. For one thread.

    A state is a set of places. A place has, as the callers of its rule, all of them: they are one
    object for the same set, so that two texts are in one state whatever came before what their
    grammars still know. A rule at another one's end is its callers' own, so that a list does not
    become deeper with each element. (A parser by Tomita's and Leo's means.)

    Args:
        rules: Of the grammar.
        texts: What each token writes.
        stops: Tokens that end a text.

    Raises:
        NotFollowed: A rule begins with itself, or a text in too many ways.
    """

    def __init__(self, rules: Rules, texts: Sequence[bytes], stops: frozenset[int]) -> None:
        self._texts, self._stops = texts, stops
        self._rules = rules
        self._edges = sum(map(len, (*rules.ranges.values(), *rules.calls.values())))
        self._rank, self._empty = in_order(rules)
        self._kinds = kinds_of(rules.ranges)
        self._zero: dict[int, tuple[int, ...]] = {}
        self._first: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        self._root = Caller(frozenset())
        self._root.places = frozenset({(FINAL, self._root)})
        self._ended = State(frozenset(), complete=False, terminated=True, after={})
        self._callers: dict[frozenset[Place], Caller] = {}
        self._states: dict[tuple[frozenset[Place], bool], State] = {}
        self._looked = self._walked = self._kept = self._num_behind = 0
        self.followed = True
        """False: it does not pay, or xgrammar follows the grammar otherwise."""
        start = self._state({(rules.starts[rules.root], self._root)})
        if start is None:
            raise NotFollowed("a text may begin in too many ways")
        self.start = start

    @classmethod
    def of(cls, grammar: Any, texts: Sequence[bytes], stops: frozenset[int]) -> Automaton | None:
        """The automaton of xgrammar's compiled grammar; None: it has parts that are not followed
        here, which is logged."""
        try:
            return cls(Rules.read(_printed(grammar)), texts, stops)
        except NotFollowed as error:
            logger.info("masks of a grammar are filled for each step: %s", error)
            return None

    @property
    def num_bytes(self) -> int:
        """About what it takes. Any thread may ask."""
        behind = BEHIND_BYTES * self._num_behind
        return EDGE_BYTES * self._edges + KEPT_BYTES * self._kept + behind

    def walk(self, state: State, token: int) -> State | None:
        """Where a text is behind a token; None: not known, mostly since it is not allowed."""
        if not self.followed:
            return None
        self._walked += 1
        if token in self._stops:
            return self._ended if state.complete else None
        text = self._texts[token]
        if not text:
            return None
        kinds = text.translate(self._kinds)
        known = state.behind.get(kinds)
        if known is not None:
            return known
        found: Any = state
        for kind in kinds:
            after = found.after
            found = after[kind] if kind in after else self._find(found, kind)
            if found is None:
                return None
        if self._num_behind < MOST_BEHIND:
            self._num_behind += 1
            state.behind[kinds] = found
        return cast(State, found)

    def give_up(self, reason: str) -> None:
        """No request follows the grammar any more."""
        if self.followed:
            self.followed = False
            logger.error(
                "masks of a grammar are filled for each step from now on: %s; please report this, "
                "with the version of xgrammar", reason,
            )  # fmt: skip

    def _find(self, state: State, kind: int) -> State | None:
        """What comes behind a byte that no text had there before."""
        if not self.followed:
            return None
        if self._looked > max(TRIED, WORTH * self._walked):
            self.followed = False
            logger.info(
                "masks of a grammar are filled for each step: it took long to find where %d "
                "tokens lead, since few states come again", self._walked,
            )  # fmt: skip
            return None
        byte, ranges = self._kinds.index(kind), self._rules.ranges
        edges = [(caller, ranges[place]) for place, caller in state.places]
        self._looked += sum(len(each) for _, each in edges) // EDGES
        kernel = {
            (target, caller)
            for caller, each in edges
            for low, high, target in each
            if low <= byte <= high
        }
        after = self._state(kernel) if kernel else None
        if kernel and after is None:
            self.followed = False
            logger.info(
                "masks of a grammar are filled for each step: a text may go on in too many ways"
            )
        else:
            state.after[kind] = after
        return after

    def _state(self, kernel: set[Place]) -> State | None:
        """The state of a text that has come to these places, which others come from without a byte;
        None: there are too many."""
        rules = self._rules
        seen: set[Place] = set()
        places: set[Place] = set()
        waiting: dict[int, set[Place]] = {}
        ranks: list[tuple[int, int]] = []
        work = list(kernel)
        complete, left = False, MOST_LOOKED_AT

        def wait(rule: int, target: int, caller: Caller) -> None:
            nonlocal left
            left -= 1
            if rule not in waiting:
                waiting[rule] = set()
                heapq.heappush(ranks, (self._rank[rule], rule))
            if target in rules.only_ends:
                left -= len(caller.places)
                waiting[rule] |= caller.places
            else:
                waiting[rule].add((target, caller))

        while work and left > 0:
            place = work.pop()
            if place in seen:
                continue
            seen.add(place)
            state, caller = place
            complete = complete or state == FINAL
            others = self._without_a_byte(state)
            left -= len(others)
            for each in others:
                if each in rules.ends:
                    work += caller.places
                if each in rules.ranges:
                    places.add((each, caller))
                for rule, target in rules.calls.get(each, ()):
                    wait(rule, target, caller)
        while ranks and left > 0:
            _, rule = heapq.heappop(ranks)
            caller = self._caller(frozenset(waiting[rule]))
            firsts, calls = self._begin(rule)
            left -= len(firsts)
            places.update((each, caller) for each in firsts)
            for other, target in calls:
                wait(other, target, caller)
        looked = FIND + MOST_LOOKED_AT - left
        self._looked += looked
        if left <= 0:
            return None
        if self._kept > MOST_KEPT:
            self._forget()
        self._kept += looked
        key = frozenset(places), complete
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = State(*key, terminated=False, after={})
        return found

    def _forget(self) -> None:
        """Keep no state but the first one and those that texts are in, from which none are known:
        a holder of one would hold all that were found behind it."""
        for each in (self.start, *self._states.values()):
            each.after.clear()
            each.behind.clear()
        self._states.clear()
        self._callers.clear()
        self._kept = self._num_behind = 0

    def _caller(self, places: frozenset[Place]) -> Caller:
        found = self._callers.get(places)
        if found is None:
            found = self._callers[places] = Caller(places)
        return found

    def _without_a_byte(self, state: int) -> tuple[int, ...]:
        """States that a text in this one is in as well."""
        found = self._zero.get(state)
        if found is None:
            rules, reached, work = self._rules, {state}, [state]
            while work:
                each = work.pop()
                others = {*rules.skips.get(each, ())}
                others |= {to for rule, to in rules.calls.get(each, ()) if rule in self._empty}
                work += others - reached
                reached |= others
            found = self._zero[state] = tuple(reached)
        return found

    def _begin(self, rule: int) -> tuple[list[int], list[tuple[int, int]]]:
        """States in which a rule waits for its first byte, and other rules that it begins with."""
        found = self._first.get(rule)
        if found is None:
            rules = self._rules
            states = self._without_a_byte(rules.starts[rule])
            firsts = [each for each in states if each in rules.ranges]
            calls = [call for each in states for call in rules.calls.get(each, ())]
            found = self._first[rule] = firsts, calls
        return found


def _printed(grammar: Any) -> str:
    """The rules of xgrammar's compiled grammar, by what it has for its own tests.

    Raises:
        NotFollowed: This version does not have it, or not for this grammar.
    """
    try:
        from xgrammar.testing import _print_grammar_fsms

        return str(_print_grammar_fsms(grammar.grammar))
    except Exception as error:  # of many types
        raise NotFollowed(f"xgrammar does not print it ({describe(error)})") from error
