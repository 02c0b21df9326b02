"""Agreement between hosts: one rank has a connection to each other one, and gives all the same
answers, when all have asked.

What comes on a connection can be trusted to come from its other end
(:mod:`reprise.processes.sealed`).
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from reprise.distributed.board import failed, sendable
from reprise.errors import RanksError, RepriseError, describe
from reprise.processes.sealed import Sealed

MESSAGE, ANSWER, BEAT, QUESTION, FAILURE, CALL, LOST = (bytes([each]) for each in range(7))
"""The first byte of what is said. The last two: a question was asked; which has failed first."""
_NUMBER = struct.Struct("<Q")
CHECK_SECONDS = 0.25
FELL_OUT_SECONDS = 30.0
"""For so long a rank that left a pass waits for the others, which may be in a collective of it:
that is not seen from another host."""
GRACE_SECONDS = 5.0
"""By so much others wait longer than rank 0 does, which knows the one that is silent."""


class Hub:
    """The end of rank 0, which is connected to all others. One thread asks and sends.

    Args:
        connections: Of each other rank.
        timeout: Seconds that it waits for an answer.
    """

    rank = 0

    def __init__(self, connections: Mapping[int, Sealed], timeout: float) -> None:
        self.size = 1 + len(connections)
        self.alike = True
        self.timeout = timeout
        self.ended = False
        """The group is over: no rank is to wait for another one."""
        self._others = {rank: _Other(each) for rank, each in connections.items()}
        self._failure: Any = None
        self._asked = 0
        self._fell_out: str | None = None
        self._news = threading.Condition()
        for rank in self._others:
            threading.Thread(
                target=self._listen, args=(rank,), name=f"reprise-line-{rank}", daemon=True
            ).start()

    def _say(self, rank: int, body: bytes) -> None:
        try:
            self._others[rank].connection.send(body)
        except OSError as error:
            raise RanksError(f"rank {rank} cannot be reached ({describe(error)})") from error

    def end(self) -> None:
        """Nobody is to wait any more: the others end when their connections do."""
        self.ended = True
        for each in self._others.values():
            each.connection.close()
        with self._news:
            self._news.notify_all()

    # ---- what is known of a rank ---------------------------------------------------------

    def gone(self, rank: int) -> str | None:
        """Why a rank's connection has ended; None: it has not."""
        return self._others[rank].gone

    def failure(self, rank: int) -> Any:
        """The error or the words with which a rank ended; None: it has not said any."""
        return self._failure if rank == 0 else self._others[rank].failure

    @property
    def first_failure(self) -> int | None:
        """The rank that failed first: not known here."""
        return None

    def fail(self, error: BaseException | str) -> None:
        """Say what ended this rank: the first one counts."""
        if self._failure is None:
            self._failure = error

    def check(self) -> None:
        """Raise if the group is over or a rank has failed."""
        if self.ended:
            raise RanksError("the ranks have ended")
        for rank, each in self._others.items():
            if each.failure is not None:
                raise failed(rank, each.failure)
            if each.gone is not None:
                raise failed(rank, each.gone)

    # ---- agreement -----------------------------------------------------------------------

    def all(self, ok: bool) -> bool:
        """See :class:`reprise.distributed.Agreement`."""
        return self.largest(0.0 if ok else 1.0) == 0.0

    def largest(self, value: float) -> float:
        """See :class:`reprise.distributed.Agreement`.

        Raises:
            RanksError: A rank has failed or did not answer in time.
        """
        return self.largest_of([value])[0]

    def largest_of(self, values: Sequence[float]) -> list[float]:
        """Of several numbers, the largest that a rank says of each.

        Args:
            values: As many on each rank.

        Raises:
            RanksError: A rank has failed or did not answer in time.
        """
        number = self._asked = self._asked + 1
        why, self._fell_out = self._fell_out, None
        patience = self.timeout if why is None else FELL_OUT_SECONDS
        until = time.monotonic() + patience
        with self._news:
            for rank, each in self._others.items():
                while number not in each.asked:
                    self.check()
                    if time.monotonic() > until:
                        error = RanksError(
                            f"{'' if why is None else f'{why}; '}rank {rank} did not answer within "
                            f"{patience:.0f} s; the group ends"
                        )
                        # A rank that left a pass is the reason itself: others may wait for it
                        # there.
                        error.rank = rank if why is None else None
                        self._give_up(error)
                        raise error
                    self._news.wait(CHECK_SECONDS)
            told = [each.asked.pop(number) for each in self._others.values()]
        found = [max(column) for column in zip(values, *told, strict=True)]
        for rank in self._others:
            self._say(rank, ANSWER + _packed(number, found))
        return found

    def _give_up(self, error: RanksError) -> None:
        """Nobody is waited for any more: one that did not answer has failed."""
        if error.rank is None:
            self.fail(error)
        else:
            self._others[error.rank].failure = error

    def fell_out(self, reason: str) -> None:
        """See :class:`reprise.distributed.Agreement`."""
        self._fell_out = reason

    def note_calls(self, count: int) -> None:
        """Collectives that were begun: of no use from afar."""

    def calls(self, rank: int) -> int:
        """Collectives that a rank has begun: not known from afar, 0 of each."""
        return 0

    # ---- a thread for each other rank ----------------------------------------------------

    def _listen(self, rank: int) -> None:
        other = self._others[rank]
        try:
            while True:
                body = other.connection.receive()
                with self._news:
                    self._take(rank, body[:1], body[1:])
                    self._news.notify_all()
                self._taken()
        except Exception as error:
            # Whatever it is, from this rank nothing more can be read.
            why = "its connection has ended" if isinstance(error, EOFError) else describe(error)
            with self._news:
                other.gone = why
                self._news.notify_all()
            self._taken()

    def _take(self, rank: int, kind: bytes, content: bytes) -> None:
        """Under the lock."""
        other = self._others[rank]
        if kind == QUESTION:
            number, values = _unpacked(content)
            other.asked[number] = values
        elif kind == FAILURE:
            other.failure = pickle.loads(content)
        else:
            raise RepriseError(f"rank {rank} said {kind!r}, which has no place here")

    def _taken(self) -> None:
        """Called after something came, or a rank was lost."""


class _Other:
    """What rank 0 knows of one."""

    def __init__(self, connection: Sealed) -> None:
        self.connection = connection
        self.asked: dict[int, list[float]] = {}
        """Questions that it has asked and that were not answered yet, with what it says itself."""
        self.failure: Any = None
        self.gone: str | None = None


class Spoke:
    """The end of another rank. A thread reads, so that rank 0's end is noticed whatever is
    computed.

    Args:
        connection: To rank 0.
        rank: Ours.
        size: Ranks there are.
    """

    def __init__(self, connection: Sealed, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.alike = True
        self.timeout = 600.0
        """Seconds that a rank waits for an answer of the others."""
        self.ended = False
        """There is nobody to tell anything."""
        self._connection = connection
        self._answers: queue.SimpleQueue[tuple[int, list[float]] | None] = queue.SimpleQueue()
        self._asked = 0
        self._fell_out: str | None = None
        self._left = False
        threading.Thread(target=self._listen, name="reprise-line", daemon=True).start()

    def fail(self, error: BaseException | str) -> None:
        """Say what ended this rank."""
        self._say(FAILURE + sendable(error))

    def all(self, ok: bool) -> bool:
        """See :class:`reprise.distributed.Agreement`."""
        return self.largest(0.0 if ok else 1.0) == 0.0

    def largest(self, value: float) -> float:
        """See :class:`reprise.distributed.Agreement`.

        Raises:
            RanksError: Rank 0 is gone, or did not answer in time.
        """
        return self.largest_of([value])[0]

    def largest_of(self, values: Sequence[float]) -> list[float]:
        """See :meth:`Hub.largest_of`.

        Raises:
            RanksError: Rank 0 is gone, or did not answer in time.
        """
        self._asked += 1
        self._say(QUESTION + _packed(self._asked, values))
        why, self._fell_out = self._fell_out, None
        patience = self.timeout if why is None else FELL_OUT_SECONDS
        try:
            answer = self._answers.get(timeout=0 if self.ended else patience + GRACE_SECONDS)
        except queue.Empty:
            answer = None
            self.ended = True
        if answer is None:
            told = self._no_answer(patience)
            error = RanksError(told if why is None else f"{why}; {told}")
            error.rank = 0 if why is None else None
            raise error
        number, found = answer
        if number != self._asked:
            raise RanksError(f"question {self._asked} was answered with number {number}")
        return found

    def _no_answer(self, patience: float) -> str:
        """Why there is none."""
        return f"rank 0 gave no answer within {patience:.0f} s, or has ended; the group ends"

    def fell_out(self, reason: str) -> None:
        """See :class:`reprise.distributed.Agreement`."""
        self._fell_out = reason

    def note_calls(self, count: int) -> None:
        """Collectives that were begun: of no use from afar."""

    def close(self) -> None:
        """Leave."""
        self.ended = self._left = True
        self._connection.close()

    def _say(self, body: bytes) -> None:
        with contextlib.suppress(OSError):  # rank 0 is gone, which the thread notices
            self._connection.send(body)

    def _listen(self) -> None:
        try:
            while True:
                body = self._connection.receive()
                self._hear(body[:1], body[1:])
        except (OSError, EOFError, RepriseError):
            self.ended = True
            self._answers.put(None)
            self._over()

    def _hear(self, kind: bytes, content: bytes) -> None:
        if kind != ANSWER:
            raise RepriseError(f"rank 0 said {kind!r}, which has no place here")
        self._answers.put(_unpacked(content))

    def _over(self) -> None:
        """Called by the thread when nothing more will come."""


def _packed(number: int, values: Sequence[float]) -> bytes:
    return _NUMBER.pack(number) + struct.pack(f"<{len(values)}d", *values)


def _unpacked(content: bytes) -> tuple[int, list[float]]:
    (number,) = _NUMBER.unpack_from(content)
    count = (len(content) - _NUMBER.size) // 8
    return number, list(struct.unpack_from(f"<{count}d", content, _NUMBER.size))
