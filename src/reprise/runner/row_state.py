"""What the sampler keeps on the device of some requests from draw to draw, at their rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from reprise.platforms import Platform
from reprise.step import Admission


class Draw(NamedTuple):
    """One row of a step's logits that is drawn from."""

    row: int
    request: Admission
    number: int
    """Of the request in the step."""
    ahead: int
    """How many of the request's drafts come before the token that is drawn."""


class RowState(ABC):
    """Something for each row that needs it.

    It changes on the device alone, so that no draw waits for the host; it is made from the
    request's tokens when the request is new or was preempted.

    Args:
        vocab_size: V.
        num_rows: S, rows of requests and the null row.
        platform: The device.
    """

    def __init__(self, vocab_size: int, num_rows: int, platform: Platform) -> None:
        self.vocab_size = vocab_size
        self.num_rows = num_rows
        self.platform = platform
        self.forget()

    def ensure(self, admission: Admission) -> int:
        """The request's row; what lies there is made if it is not the request's yet."""
        row = admission.row
        if row not in self._filled:
            self._filled.add(row)
            self.fill(row, admission)
        return row

    @abstractmethod
    def fill(self, row: int, admission: Admission) -> None:
        """Make what lies at ``row`` that of a request whose tokens are all known."""

    def release(self, row: int) -> None:
        """The row is free, or another request's."""
        self._filled.discard(row)

    def forget(self) -> None:
        """Forget all requests."""
        self._filled: set[int] = set()
