"""The rules of a grammar as xgrammar prints them."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_PRINTED = 1 << 18
"""Characters of a grammar that is followed: they are read in some hundredths of a second."""
MOST_REPEATED = 1 << 14
"""Times that its rules are repeated by number."""

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

FINAL = -1
"""The state of a text that its root rule matches; all others that are negative are those between
repetitions."""


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
        numbers = itertools.count(FINAL - 1, -1)  # of states for each number of times
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


def in_order(rules: Rules) -> tuple[dict[int, int], set[int]]:
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
                begun[rule] = {rules.starts[rule]}, [(FINAL, rules.starts[rule])]
            reached, work = begun[rule]
            while work:
                other, state = work[-1]
                if other != FINAL and other not in rank:
                    break
                work.pop()
                if other == FINAL:
                    work += rules.calls.get(state, ())
                    nexts = rules.skips.get(state, ())
                else:
                    nexts = (state,) if other in empty else ()
                for to in nexts:
                    if to not in reached:
                        reached.add(to)
                        work.append((FINAL, to))
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


def kinds_of(ranges: Mapping[int, Sequence[tuple[int, int, int]]]) -> bytes:
    """A number for each byte, the same for those that no state tells apart."""
    cuts = {low for each in ranges.values() for low, _, _ in each}
    cuts |= {high + 1 for each in ranges.values() for _, high, _ in each}
    kinds, kind = bytearray(), 0
    for byte in range(256):
        kind += byte in cuts and byte > 0
        kinds.append(kind)
    return bytes(kinds)
