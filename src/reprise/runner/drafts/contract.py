"""What drafts tokens for a step to verify beside the newest one of each request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from reprise.graphs import GraphRunner
from reprise.step import Step


class Drafter(Protocol):
    """Fills what rows have behind their newest tokens. Works on the device alone, and nobody else
    knows in how many passes, or of what."""

    @property
    def owners(self) -> Mapping[str, GraphRunner]:
        """Who runs its graphs, by names for people; empty if it computes no model."""

    def admit(self, step: Step) -> None:
        """Rows have new owners, whose known tokens the step says."""

    def judge(self, step: Step, rows: Tensor, first_draw: Tensor, drawn: Tensor) -> None:
        """Tokens were drawn; the rows have not moved on yet.

        Args:
            step: Whose they are.
            rows: [R] int64, the step's.
            first_draw: [R + 1] int32, where each request's draws begin.
            drawn: [D] int64.
        """

    def propose(self, step: Step, rows: Tensor, emitted: Tensor) -> None:
        """The rows have moved on: draft.

        Args:
            step: Whose they are.
            rows: [R] int64, the step's.
            emitted: [R, 1 + K] int64, their new tokens, -1 behind them.
        """

    def memory(self) -> dict[str, Tensor]:
        """What lies on the device from step to step, by name."""

    def forget(self) -> None:
        """A step failed half-way, or inputs were overwritten: the next step is begun anew."""
