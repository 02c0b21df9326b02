"""One answer for all ranks, on the host."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from reprise.errors import RanksError


class Agreement(Protocol):
    """Asked in the same order on each rank; every rank gets the same answer.

    A rank that may fail between two questions answers them all the same: a rank that is not heard
    leaves the others waiting.
    """

    @property
    def size(self) -> int:
        """Ranks there are."""

    @property
    def alike(self) -> bool:
        """All ranks compute the same steps: what one knows of a step, all know."""

    def all(self, ok: bool) -> bool:
        """Whether every rank says True."""

    def largest(self, value: float) -> float:
        """The largest number that a rank says."""

    def fell_out(self, reason: str) -> None:
        """Said before the next question by a rank that left a pass over the model in its midst.

        Others may be in a collective of it that this one never enters, and would wait for ever:
        then that question raises a RanksError with the reason. If all left alike, it does not.
        """


class _Alone:
    size = 1
    alike = True

    def all(self, ok: bool) -> bool:
        return ok

    def largest(self, value: float) -> float:
        return value

    def fell_out(self, reason: str) -> None:
        pass


ALONE_AGREES: Agreement = _Alone()
"""Of one rank with itself."""


def require_same(agreement: Agreement, *facts: Any) -> None:
    """Refuse to begin where ranks are not alike.

    Args:
        agreement: Of the ranks.
        facts: What has to be the same on all, each with a ``repr`` that says all of it.

    Raises:
        RanksError: One rank has other facts.
    """
    # 48 bits: whole numbers that a float has exactly.
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=6).digest()
    number = float(int.from_bytes(digest, "little"))
    most, least = agreement.largest(number), -agreement.largest(-number)
    if most != least:
        raise RanksError(
            "the ranks are not alike: versions of reprise and torch, options, dtype and the chosen "
            f"implementations of ops must be the same on all; this rank has {facts!r}"
        )
