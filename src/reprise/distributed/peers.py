"""Between hosts, engines or ranks none of which leads the others: each may ask first, those that
rest are called, and all learn which has failed first (:mod:`reprise.distributed.star`).
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from reprise.distributed.board import failed, sendable
from reprise.distributed.star import CALL, FAILURE, LOST, Hub, Spoke
from reprise.errors import RanksError
from reprise.processes.sealed import Sealed

_NUMBER = struct.Struct("<Q")
_RANK = struct.Struct("<H")
SETTLE_SECONDS = 1.0
"""For the end of another rank to be seen here: what fails here may fail since that one is gone."""


class FirstPeer(Hub):
    """Rank 0's end.

    Args:
        connections: Of each other rank.
        timeout: Seconds that it waits for an answer.
    """

    def __init__(self, connections: Mapping[int, Sealed], timeout: float) -> None:
        self.on_asked: Callable[[], None] = lambda: None
        """See :class:`reprise.distributed.meeting.Meeting`."""
        self._rests = False
        self._called = 0
        """Number of the last question to which all others were called."""
        self._first: tuple[int, Any] | None = None
        """Which rank has failed first, and why."""
        self._told = False
        super().__init__(connections, timeout)
        self.alike = False

    @property
    def is_asked(self) -> bool:
        """Another rank has asked what this one has not answered yet."""
        return self._newest() > self._asked

    def _newest(self) -> int:
        with self._news:
            return max((max(each.asked, default=0) for each in self._others.values()), default=0)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """See :class:`reprise.distributed.meeting.Meeting`."""
        self._rests = True
        try:
            yield
        finally:
            self._rests = False

    def largest_of(self, values: Sequence[float]) -> list[float]:
        self._call(self._asked + 1)
        return super().largest_of(values)

    def _call(self, number: int) -> None:
        """Let all others know that there is a question."""
        with self._news:
            if number <= self._called:
                return
            self._called = number
            silent = [rank for rank, each in self._others.items() if number not in each.asked]
        for rank in silent:
            with contextlib.suppress(RanksError):  # it is gone, which is noticed elsewhere
                self._say(rank, CALL + _NUMBER.pack(number))

    # ---- failures ------------------------------------------------------------------------

    @property
    def first_failure(self) -> int | None:
        """The rank that failed first; None: none has."""
        return None if self._first is None else self._first[0]

    def await_first_failure(self) -> int | None:
        """As :attr:`first_failure`, once the end of another rank could be seen."""
        with self._news:
            self._news.wait_for(lambda: self._first is not None, SETTLE_SECONDS)
        return self.first_failure

    def fail(self, error: BaseException | str, seen: int | None = None) -> None:
        """Say what ended this rank, or another one that was seen to end; the first one counts."""
        with self._news:
            self._note(self.rank if seen is None else seen, error)
        self._taken()

    def check(self) -> None:
        if self._first is not None:  # this rank, too, may have been given up by others
            raise failed(*self._first)
        super().check()

    def _give_up(self, error: RanksError) -> None:
        self.fail(error, error.rank)

    def _note(self, rank: int, cause: Any) -> None:
        if self._first is None:
            self._first = rank, cause
            self._news.notify_all()

    def _take(self, rank: int, kind: bytes, content: bytes) -> None:
        if kind != FAILURE:
            super()._take(rank, kind, content)
            return
        (whose,) = _RANK.unpack_from(content)
        self._note(whose, pickle.loads(content[_RANK.size :]))

    def _taken(self) -> None:
        with self._news:
            for rank, each in self._others.items():
                if each.gone is not None and not self.ended:
                    self._note(rank, each.gone)
            first, tell = self._first, self._first is not None and not self._told
            self._told |= tell
        if first is not None and tell:
            for rank in self._others:
                with contextlib.suppress(RanksError):
                    self._say(rank, LOST + _RANK.pack(first[0]) + sendable(first[1]))
        if self.is_asked:
            self._call(self._newest())
            if self._rests:
                self.on_asked()


class OtherPeer(Spoke):
    """The end of another rank.

    Args:
        connection: To rank 0.
        rank: Ours.
        size: Ranks there are.
    """

    def __init__(self, connection: Sealed, rank: int, size: int) -> None:
        self.on_asked: Callable[[], None] = lambda: None
        """See :class:`reprise.distributed.meeting.Meeting`."""
        self._rests = False
        self._called = 0
        """Number of the last question that another rank has asked."""
        self._first: tuple[int, Any] | None = None
        self._lost = threading.Event()
        super().__init__(connection, rank, size)
        self.alike = False

    @property
    def is_asked(self) -> bool:
        """Another rank has asked what this one has not answered yet."""
        return self._called > self._asked

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """See :class:`reprise.distributed.meeting.Meeting`."""
        self._rests = True
        try:
            yield
        finally:
            self._rests = False

    def largest_of(self, values: Sequence[float]) -> list[float]:
        if self._first is not None:
            raise failed(*self._first)  # no answer comes any more
        try:
            return super().largest_of(values)
        except RanksError:
            # What ends the wait comes before the thread has noted why.
            first = self.await_first_failure()
            if self._first is None or first == self.rank:
                raise
            raise failed(*self._first) from None

    def end(self) -> None:
        """Leave; others need not wait for this rank."""
        self.close()

    # ---- failures ------------------------------------------------------------------------

    @property
    def first_failure(self) -> int | None:
        """The rank that failed first; None: none has."""
        return None if self._first is None else self._first[0]

    def await_first_failure(self) -> int | None:
        """As :attr:`first_failure`, once the end of another rank could be seen."""
        self._lost.wait(SETTLE_SECONDS)
        return self.first_failure

    def fail(self, error: BaseException | str, seen: int | None = None) -> None:
        """Say what ended this rank, or another one that was seen to end; the first one counts."""
        whose = self.rank if seen is None else seen
        self._say(FAILURE + _RANK.pack(whose) + sendable(error))
        self._note(whose, error)

    def _note(self, rank: int, cause: Any) -> None:
        if self._first is None:
            self._first = rank, cause
            self._lost.set()

    def _hear(self, kind: bytes, content: bytes) -> None:
        if kind == CALL:
            (number,) = _NUMBER.unpack(content)
            self._called = max(self._called, number)
            if self.is_asked and self._rests:
                self.on_asked()
        elif kind == LOST:
            (rank,) = _RANK.unpack_from(content)
            self._note(rank, pickle.loads(content[_RANK.size :]))
            self._answers.put(None)
        else:
            super()._hear(kind, content)

    def _over(self) -> None:
        if not self._left:
            self._note(0, "its connection has ended")
