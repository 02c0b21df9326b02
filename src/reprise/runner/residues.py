"""Where a request ends within a row of several tokens, as caches of compressed keys have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reprise.cache.layout import TableLayout

_FEW = 4
"""Up to so many tokens of a row each place is told apart."""
_PLACES = ("completes one", "begins one", "within one")


def compressed_of(tables: Sequence[TableLayout]) -> tuple[int, ...]:
    """Tokens of rows that stand for several, of all tables, ascending."""
    return tuple(sorted({every for each in tables for every in each.compressed}))


def places_of(every: int) -> tuple[str, ...]:
    """What the last token of a request can be to a row of so many."""
    if every > _FEW:
        return _PLACES
    return (_PLACES[0], *(f"is number {number} of one" for number in range(1, every)))


def place_of(lengths: Any, every: int) -> Any:
    """Which of these it is, of requests of so many tokens: numbers or arrays of them."""
    behind = np.mod(lengths, every)
    return behind if every <= _FEW else np.minimum(behind, 2)


def shifts(tables: Sequence[TableLayout]) -> int:
    """By how many lengths a probe's rows are to differ, so that they meet each place."""
    found = compressed_of(tables)
    return min(_FEW, *found) if found else 1
