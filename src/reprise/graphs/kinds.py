"""The kind of a step: what the host knows of it that a graph could depend on."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Ints = np.ndarray[Any, Any]
Pair = tuple[int, int]
"""Two facts by number, the smaller first; a fact alone is a pair with itself."""


@dataclass(frozen=True, eq=False)
class Kind:
    """What is true of one step, in the terms of a :class:`Facts`."""

    step: tuple[int, ...]
    """Of each attribute of the step, which value."""
    rows: Ints
    """Of each request, the code of its attributes' values; in any order."""


class Facts:
    """The attributes that a computation tells of its steps and their rows, with their values.

    A fact is one value of one attribute. A row's values are one number, its code, so that a step
    of many rows is looked up at once.

    Args:
        step: Attributes of a whole step and the names of their values.
        row: Attributes of one request's rows, likewise.
    """

    def __init__(self, step: Mapping[str, Sequence[str]], row: Mapping[str, Sequence[str]]) -> None:
        self._row_sizes = [len(each) for each in row.values()]
        self.names = [
            f"{name}: {value}"
            for name, values in itertools.chain(step.items(), row.items())
            for value in values
        ]
        """Of every fact, by its number."""
        self.num_step_facts = sum(len(each) for each in step.values())
        sizes = [len(each) for each in step.values()]
        self._step_begins = [sum(sizes[:index]) for index in range(len(sizes))]
        self._row_begins = [
            self.num_step_facts + sum(self._row_sizes[:index])
            for index in range(len(self._row_sizes))
        ]
        self.num_codes = math.prod(self._row_sizes)

    def code(self, *values: Any) -> Any:
        """The code of a row, or of many, whose attributes have these values, numbers or arrays."""
        code: Any = 0
        for size, value in zip(self._row_sizes, values, strict=True):
            code = code * size + value
        return code

    def step_pairs(self, step: tuple[int, ...]) -> list[Pair]:
        """Every fact of a step, and every two of them."""
        facts = [begin + value for begin, value in zip(self._step_begins, step, strict=True)]
        return list(_pairs(facts))

    def row_pairs(self, code: int) -> tuple[Pair, ...]:
        """Every fact of a row, and every two of them."""
        return _row_pairs(self, code)

    def cross_pairs(self, step: tuple[int, ...], code: int) -> Iterator[Pair]:
        """A fact of the step and one of the row."""
        facts = [begin + value for begin, value in zip(self._step_begins, step, strict=True)]
        return itertools.product(facts, self._row_facts(code))

    def pairs(self, kind: Kind) -> set[Pair]:
        """All pairs of facts of a step."""
        found = set(self.step_pairs(kind.step))
        for code in set(kind.rows.tolist()):
            found.update(self.row_pairs(code), self.cross_pairs(kind.step, code))
        return found

    def name(self, pair: Pair) -> str:
        first, second = pair
        return (
            self.names[first]
            if first == second
            else " and ".join(map(self.names.__getitem__, pair))
        )

    def _row_facts(self, code: int) -> list[int]:
        facts = []
        for size, begin in zip(reversed(self._row_sizes), reversed(self._row_begins), strict=True):
            code, value = divmod(code, size)
            facts.append(begin + value)
        return facts[::-1]


@functools.lru_cache(maxsize=1 << 16)
def _row_pairs(facts: Facts, code: int) -> tuple[Pair, ...]:
    return tuple(_pairs(facts._row_facts(code)))


def _pairs(facts: Sequence[int]) -> Iterator[Pair]:
    return itertools.combinations_with_replacement(facts, 2)
