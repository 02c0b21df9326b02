"""Products of cases in short runs: as few as it takes for any two values to meet.

``@pytest.mark.covering(2)`` at a test keeps, of all that its parameters and those of its fixtures
give, cases in which every two values of different parameters are together at least once; with 1
every value is there. What is left over is ``long``. ``where``, which takes the parameters, says
which cases can be at all: only those count, and others, which skip themselves, stay.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest

Value = tuple[str, str]
"""A parameter's name and a value."""


def left_over(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Those of tests with the mark that short runs do without."""
    tests: dict[Hashable, list[pytest.Function]] = defaultdict(list)
    found = set[pytest.Item]()
    for item in items:
        mark = item.get_closest_marker("covering")
        if mark is None or not isinstance(item, pytest.Function):
            continue
        where = mark.kwargs.get("where")
        if where is None or where(**item.callspec.params):
            tests[item.nodeid.partition("[")[0], mark.args[0]].append(item)
    for (_, strength), cases in tests.items():
        kept = cover([_values(each) for each in cases], strength)
        found |= {each for number, each in enumerate(cases) if number not in kept}
    return found


def _values(item: pytest.Function) -> list[Value]:
    return [(name, repr(value)) for name, value in sorted(item.callspec.params.items())]


def cover(cases: Sequence[Sequence[Value]], strength: int) -> set[int]:
    """Numbers of cases in which any ``strength`` values that are together in some case are. Greedy:
    next is the one with most that is new, and of those the one whose values were there least."""
    meetings = [set(itertools.combinations(each, strength)) for each in cases]
    missing, kept = set[Any]().union(*meetings), set[int]()
    often = Counter[Value]()
    while missing:
        best = max(
            range(len(cases)),
            key=lambda number: (
                len(meetings[number] & missing), -sum(often[each] for each in cases[number]),
            ),
        )  # fmt: skip
        kept.add(best)
        missing -= meetings[best]
        often.update(cases[best])
    return kept
