"""Where engines that compute in step meet, and what all their ranks know of each other."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from reprise.distributed.agreement import Agreement
from reprise.distributed.board import Board
from reprise.distributed.ring import wake


class Meeting(Protocol):
    """One engine's view of all. Each may ask at any moment; all have to."""

    timeout: float
    """Seconds that one waits for another."""
    on_asked: Callable[[], None]
    """Called in a thread of its own when another engine asks and this one rests."""

    @property
    def is_asked(self) -> bool:
        """Another engine has asked what this one has not answered yet."""

    @property
    def ended(self) -> bool:
        """Nobody is to wait for anybody."""

    def resting(self) -> AbstractContextManager[None]:
        """In the ``with`` block this engine does not look whether it :attr:`is_asked`."""

    def largest_of(self, values: Sequence[float]) -> list[float]:
        """Of several numbers, the largest that an engine says of each.

        Args:
            values: As many of each engine, at most :data:`reprise.distributed.board.MOST_NUMBERS`.

        Raises:
            RepriseError: An engine has failed or did not answer in time.
        """

    def fail(self, error: BaseException | str, seen: int | None = None) -> None:
        """This engine has failed, or another one that was seen to: others need not wait for it."""

    def end(self) -> None:
        """This engine leaves."""


class Everyone(Agreement, Protocol):
    """All ranks of all engines."""

    rank: int
    """Ours, among all."""

    @property
    def ended(self) -> bool:
        """Nobody is to wait for anybody."""

    @property
    def first_failure(self) -> int | None:
        """The rank that failed first; None: none has."""

    def await_first_failure(self) -> int | None:
        """As :attr:`first_failure`, once the end of another rank could be seen."""

    def note_calls(self, count: int) -> None:
        """Say how many collectives this rank has begun."""

    def fail(self, error: BaseException | str, seen: int | None = None) -> None:
        """Say what ended this rank, or another one that was seen to end; the first one counts."""

    def end(self) -> None:
        """This rank leaves."""


class SharedMeeting:
    """Of engines on one machine, through memory; those that rest are woken through pipes.

    Args:
        board: Of the engines.
        woken: File descriptor that others write to when they ask.
        wakers: Of each of the others: its ``woken``'s other end; of this engine -1.
    """

    def __init__(self, board: Board, woken: int, wakers: Sequence[int]) -> None:
        self.on_asked: Callable[[], None] = lambda: None
        self._board, self._woken, self._wakers = board, woken, wakers
        threading.Thread(target=self._listen, name="reprise-lockstep", daemon=True).start()

    @property
    def timeout(self) -> float:
        return self._board.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._board.timeout = seconds

    @property
    def is_asked(self) -> bool:
        return self._board.is_asked

    @property
    def ended(self) -> bool:
        return self._board.ended

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        self._board.fall_asleep(True)
        try:
            yield
        finally:
            self._board.fall_asleep(False)

    def largest_of(self, values: Sequence[float]) -> list[float]:
        return self._board.largest_of(values, self._wake_others)

    def fail(self, error: BaseException | str, seen: int | None = None) -> None:
        self._board.fail(error, seen)

    def end(self) -> None:
        self._board.end()

    def _wake_others(self) -> None:
        for rank, waker in enumerate(self._wakers):
            if waker >= 0 and self._board.asleep(rank):
                wake(waker)

    def _listen(self) -> None:
        while os.read(self._woken, 4096):
            self.on_asked()
