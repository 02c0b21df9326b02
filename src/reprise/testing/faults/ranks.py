"""Faults of one of several ranks, put into its process by name (``parallel.leader.SETUP``)."""

from __future__ import annotations

from reprise.parallel import messages


def draws_otherwise(rank: int) -> None:
    """What the rank has drawn is not what others have."""
    note = messages.Drawn.note

    def other(self: messages.Drawn, sampled: list[list[int]]) -> None:
        note(self, [[token + 1 for token in each] for each in sampled])

    messages.Drawn.note = other  # type: ignore[assignment,method-assign]
