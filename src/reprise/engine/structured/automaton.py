"""Where a text stands in its grammar, and the same for every text that may go on alike."""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MOST_PRINTED = 1 << 18
"""Characters of a grammar that is followed: to read so many takes a tenth of a second."""
MOST_REPEATED = 1 << 14
"""Times that its rules are repeated by number."""
MOST_LOOKED_AT = 2048
"""Places, and rules that begin there, that are looked at to find one state: half a millisecond, and
a step has many rows."""
MOST_STATES = 4096
"""That are kept; all are forgotten when there are more."""
STATE_BYTES = 1024
"""About what one takes, with the ways from it."""
EDGE_BYTES = 160
TRIED = 4096
"""Ways from state to state that have to be found before anybody asks whether that pays: each
takes as long as one or two masks."""

_BYTE = r"(\\x[0-9a-f]{2}|\\.|[\x20-\x7e])"
_EDGE = re.compile(
    rf"(?:'{_BYTE}'|\[{_BYTE}-{_BYTE}\]|Rule\((\d+)\)"
    r"|Repeat\(rule=(\d+), min=(\d+), max=(\d+)\)|Eps)->(\d+)(?:, |$)"
)
_RULE = re.compile(
    r"Rule (\d+): (\S+), FSM: CompactFSM\(num_states=\d+, start=(\d+), end=\[([\d, ]*)\], edges=\["
)
_LINE = re.compile(r"(\d+): \[(.*)\]")
_ESCAPES = dict(zip("abtnvfre0\"'?\\", b"\a\b\t\n\v\f\r\x1b\0\"'?\\", strict=True))

_FINAL = -1
"""The state of a text that its root rule matches."""

Place = tuple[int, "Caller"]
"""A state of a rule's finite automaton, and who waits for the rule."""


@dataclass(slots=True, eq=False)
class Caller:
    """Who waits for a rule: where its callers go on when it has matched."""

    places: frozenset[Place]


@dataclass(slots=True, eq=False)
class State:
    """Of an automaton. What may follow is a function of it; two that are different may be alike."""

    places: frozenset[Place]
    complete: bool
    """The text may end here."""
    terminated: bool
    """It has ended."""
    after: dict[int, State | None]
    """Behind a byte of some kind; None: no text goes on like this."""


class NotFollowed(Exception):
    """Why a grammar has no automaton."""


@dataclass(frozen=True)
class Rules:
    """A grammar as finite automata, a rule each, whose edges are bytes, or other rules.

    xgrammar prints those that it follows itself, for its own tests.
    """

    starts: Mapping[int, int]
    """State of each rule."""
    ends: frozenset[int]
    ranges: Mapping[int, Sequence[tuple[int, int, int]]]
    """Of states: the first and the last of some bytes, and the state behind them."""
    calls: Mapping[int, Sequence[tuple[int, int]]]
    """Of states: a rule, and the state behind it."""
    skips: Mapping[int, Sequence[int]]
    """Of states: others that are as good."""
    root: int

    @functools.cached_property
    def only_ends(self) -> frozenset[int]:
        """States in which a rule matches, and does nothing else."""
        return self.ends - self.ranges.keys() - self.calls.keys() - self.skips.keys()

    @classmethod
    def read(cls, printed: str) -> Rules:
        """What xgrammar printed.

        Raises:
            NotFollowed: There is more in it than is known here.
        """
        if len(printed) > MOST_PRINTED:
            raise NotFollowed(f"it takes {len(printed)} characters to print")
        starts: dict[int, int] = {}
        ends: set[int] = set()
        ranges: dict[int, list[tuple[int, int, int]]] = {}
        calls: dict[int, list[tuple[int, int]]] = {}
        skips: dict[int, list[int]] = {}
        repeats: list[tuple[int, int, int, int, int]] = []
        roots = []
        for line in printed.split("\n"):
            if rule := _RULE.fullmatch(line):
                number = int(rule[1])
                starts[number] = int(rule[3])
                ends.update(map(int, filter(None, rule[4].split(", "))))
                if rule[2] == "root":
                    roots.append(number)
                continue
            found = _LINE.fullmatch(line)
            if found is None:
                if line in ("", "])"):
                    continue
                raise NotFollowed(f"nothing is known of {line[:80]!r}")
            state, rest, at = int(found[1]), found[2], 0
            while at < len(rest):
                edge = _EDGE.match(rest, at)
                if edge is None:
                    raise NotFollowed(f"nothing is known of {rest[at : at + 80]!r}")
                one, first, last, called, again, least, most, target = edge.groups()
                if one or first:
                    low, high = _byte(one or first), _byte(one or last)
                    ranges.setdefault(state, []).append((low, high, int(target)))
                elif called:
                    calls.setdefault(state, []).append((int(called), int(target)))
                elif again:
                    repeats.append((state, int(again), int(least), int(most), int(target)))
                else:
                    skips.setdefault(state, []).append(int(target))
                at = edge.end()
        if sum(most for _, _, _, most, _ in repeats) > MOST_REPEATED:
            raise NotFollowed(f"it counts beyond {MOST_REPEATED}")
        numbers = itertools.count(_FINAL - 1, -1)  # of states for each number of times
        for state, again, least, most, target in repeats:
            if not most:
                skips.setdefault(state, []).append(target)
            for count in range(most):
                if count >= least:
                    skips.setdefault(state, []).append(target)
                there = next(numbers) if count + 1 < most else target
                calls.setdefault(state, []).append((again, there))
                state = there
        if len(roots) != 1 or any(
            rule not in starts for each in calls.values() for rule, _ in each
        ):
            raise NotFollowed("not all of its rules are printed")
        return cls(starts, frozenset(ends), ranges, calls, skips, roots[0])


def _byte(printed: str) -> int:
    if printed.startswith("\\x"):
        return int(printed[2:], 16)
    if len(printed) == 1:
        return ord(printed)
    try:
        return _ESCAPES[printed[1]]
    except KeyError:
        raise NotFollowed(f"nothing is known of {printed!r}") from None


class Automaton:
    """Follows texts of a grammar, byte by byte, through states that are found when a text comes to
    them first. For one thread.

    A state is a set of places. A place has, as those who wait for its rule, all of them: they are
    one object for the same set, so that two texts are in one state whatever came before what their
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
        self._rank, self._empty = _in_order(rules)
        self._kinds = _kinds(rules.ranges)
        self._zero: dict[int, tuple[int, ...]] = {}
        self._first: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        self._root = Caller(frozenset())
        self._root.places = frozenset({(_FINAL, self._root)})
        self._ended = State(frozenset(), complete=False, terminated=True, after={})
        self._callers: dict[frozenset[Place], Caller] = {}
        self._states: dict[tuple[frozenset[Place], bool], State] = {}
        self._found = self._walked = 0
        self.followed = True
        """False: it does not pay, or xgrammar follows the grammar otherwise."""
        start = self._state({(rules.starts[rules.root], self._root)})
        if start is None:
            raise NotFollowed("a text may begin in too many ways")
        self.start = start

    @classmethod
    def of(cls, grammar: Any, texts: Sequence[bytes], stops: frozenset[int]) -> Automaton | None:
        """Of xgrammar's compiled grammar; None: it has parts that are not followed here, which is
        logged."""
        from xgrammar import testing

        printer = getattr(testing, "_print_grammar_fsms", None)
        try:
            if printer is None:
                raise NotFollowed("this version of xgrammar does not print it")
            return cls(Rules.read(printer(grammar.grammar)), texts, stops)
        except NotFollowed as error:
            logger.info("masks of a grammar are filled for each step: %s", error)
            return None

    @property
    def num_bytes(self) -> int:
        """About what it takes. Any thread may ask."""
        rules = self._rules
        edges = sum(map(len, (*rules.ranges.values(), *rules.calls.values())))
        return EDGE_BYTES * edges + STATE_BYTES * len(self._states)

    def walk(self, state: State, token: int) -> State | None:
        """Where a text is behind a token; None: nobody knows, mostly since it is not allowed."""
        self._walked += 1
        if token in self._stops:
            return self._ended if state.complete else None
        text = self._texts[token]
        if not text:
            return None
        found: Any = state
        for kind in text.translate(self._kinds):
            after = found.after
            found = after[kind] if kind in after else self._find(found, kind)
            if found is None:
                return None
        return found

    def give_up(self, reason: str) -> None:
        """Nobody follows the grammar from now on."""
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
        self._found += 1
        if self._found % TRIED == 0 and self._found > self._walked:
            self.followed = False
            logger.info(
                "masks of a grammar are filled for each step: %d tokens led to %d states, few of "
                "which come again", self._walked, self._found,
            )  # fmt: skip
            return None
        byte, ranges = self._kinds.index(kind), self._rules.ranges
        kernel = {
            (target, caller)
            for place, caller in state.places
            for low, high, target in ranges[place]
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
            complete = complete or state == _FINAL
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
        if left <= 0:
            return None
        return self._kept(frozenset(places), complete)

    def _kept(self, places: frozenset[Place], complete: bool) -> State:
        found = self._states.get((places, complete))
        if found is None:
            if len(self._states) >= MOST_STATES:
                self._states.clear()
                self._callers.clear()
            found = State(places, complete, terminated=False, after={})
            self._states[places, complete] = found
        return found

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


def _in_order(rules: Rules) -> tuple[dict[int, int], set[int]]:
    """Of each rule a number that is lower than those of the rules that it may begin with; and the
    rules that match nothing as well."""
    rank: dict[int, int] = {}
    empty: set[int] = set()
    begun: dict[int, tuple[set[int], list[tuple[int, int]]]] = {}
    for each in rules.starts:
        stack = [each] if each not in rank else []
        while stack:
            rule = stack[-1]
            if rule not in begun:
                begun[rule] = {rules.starts[rule]}, [(_FINAL, rules.starts[rule])]
            reached, work = begun[rule]
            while work:
                other, state = work[-1]
                if other != _FINAL and other not in rank:
                    break
                work.pop()
                if other == _FINAL:
                    work += rules.calls.get(state, ())
                    nexts = rules.skips.get(state, ())
                else:
                    nexts = (state,) if other in empty else ()
                for to in nexts:
                    if to not in reached:
                        reached.add(to)
                        work.append((_FINAL, to))
            if work:
                if work[-1][0] in begun:
                    raise NotFollowed("a rule of it begins with itself")
                stack.append(work[-1][0])
                continue
            stack.pop()
            rank[rule] = -len(rank)
            if not rules.ends.isdisjoint(reached):
                empty.add(rule)
    return rank, empty


def _kinds(ranges: Mapping[int, Sequence[tuple[int, int, int]]]) -> bytes:
    """A number for each byte, the same for those that no state tells apart."""
    cuts = {low for each in ranges.values() for low, _, _ in each}
    cuts |= {high + 1 for each in ranges.values() for _, high, _ in each}
    kinds, kind = bytearray(), 0
    for byte in range(256):
        kind += byte in cuts and byte > 0
        kinds.append(kind)
    return bytes(kinds)
