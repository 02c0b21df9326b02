"""Between hosts, what :mod:`reprise.distributed.board` and :mod:`reprise.distributed.ring` are on
one: messages from the leader in one order, answers that all agree on, and who has failed.

Each follower has one connection to the leader, which each of its frames can be trusted to come from
(:mod:`reprise.processes.sealed`). Agreement goes by the leader, who asks nobody that has not asked.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any

from reprise.distributed.board import failed, sendable
from reprise.errors import RanksError, RepriseError, describe
from reprise.processes.sealed import Sealed

_MESSAGE, _ANSWER, _BEAT, _QUESTION, _FAILURE = (bytes([each]) for each in range(5))
_BEAT_WORDS = struct.Struct("<QQ")
"""Messages received, messages carried out."""
_ASKED_WORDS = struct.Struct("<Qd")
"""Number of a question, and a value."""
CHECK_SECONDS = 0.25
FELL_OUT_SECONDS = 30.0
"""For so long a rank that left a pass waits for the others, who may be in a collective of it: on
another host nobody sees that."""


class LeadersLine:
    """The leader's end of all connections. One thread asks and sends.

    Args:
        connections: Of each follower, by its rank.
        timeout: Seconds that the leader waits for an answer.
    """

    rank = 0

    def __init__(self, connections: Mapping[int, Sealed], timeout: float) -> None:
        self.size = 1 + len(connections)
        self.alike = True
        self.timeout = timeout
        self.sent = 0
        """Messages so far."""
        self.ended = False
        """The group is over: nobody is to wait for anybody."""
        self._followers = {rank: _Follower(each) for rank, each in connections.items()}
        self._failure: Any = None
        self._asked = 0
        self._fell_out: str | None = None
        self._news = threading.Condition()
        for rank, each in self._followers.items():
            threading.Thread(
                target=self._listen, args=(each,), name=f"reprise-line-{rank}", daemon=True
            ).start()

    def send(self, message: bytes) -> None:
        """Give every follower a message.

        Raises:
            RanksError: A follower cannot be reached.
        """
        self.sent += 1
        for rank, each in self._followers.items():
            self._say(rank, each, _MESSAGE + message)

    def _say(self, rank: int, follower: _Follower, body: bytes) -> None:
        try:
            follower.connection.send(body)
        except OSError as error:
            raise RanksError(f"rank {rank} cannot be reached ({describe(error)})") from error

    def end(self) -> None:
        """Nobody is to wait any more: followers end when their connections do."""
        self.ended = True
        for each in self._followers.values():
            each.connection.close()
        with self._news:
            self._news.notify_all()

    # ---- what is known of a rank ---------------------------------------------------------

    def beats(self, rank: int) -> int:
        """Changes while a rank's process runs."""
        return self._followers[rank].beats

    def received(self, rank: int) -> int:
        """Messages that a rank has taken, as it said last."""
        return self._followers[rank].received

    def done(self, rank: int) -> int:
        """Messages that a rank has carried out, as it said last."""
        return self._followers[rank].done

    def gone(self, rank: int) -> str | None:
        """Why a rank's connection has ended; None: it has not."""
        return self._followers[rank].gone

    def failure(self, rank: int) -> Any:
        """The error or the words with which a rank ended; None: it has not said any."""
        return self._failure if rank == 0 else self._followers[rank].failure

    def fail(self, error: BaseException | str) -> None:
        """Say what ended this rank: the first one counts."""
        if self._failure is None:
            self._failure = error

    def check(self) -> None:
        """Raise if there is nobody to wait for any more."""
        if self.ended:
            raise RanksError("the ranks have ended")
        for rank, each in self._followers.items():
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
        number = self._asked = self._asked + 1
        why, self._fell_out = self._fell_out, None
        patience = self.timeout if why is None else FELL_OUT_SECONDS
        until = time.monotonic() + patience
        with self._news:
            for rank, each in self._followers.items():
                while number not in each.asked:
                    self.check()
                    if time.monotonic() > until:
                        error = RanksError(
                            f"{'' if why is None else f'{why}; '}rank {rank} did not answer within "
                            f"{patience:.0f} s; the group ends"
                        )
                        self.fail(error)
                        raise error
                    self._news.wait(CHECK_SECONDS)
            found = max([value, *(each.asked.pop(number) for each in self._followers.values())])
        for rank, each in self._followers.items():
            self._say(rank, each, _ANSWER + _ASKED_WORDS.pack(number, found))
        return found

    def fell_out(self, reason: str) -> None:
        """See :class:`reprise.distributed.Agreement`."""
        self._fell_out = reason

    def note_calls(self, count: int) -> None:
        """Collectives that were begun: of no use from afar."""

    # ---- a thread for each follower ------------------------------------------------------

    def _listen(self, follower: _Follower) -> None:
        try:
            while True:
                self._take(follower, follower.connection.receive())
        except Exception as error:
            # Whatever it is, from this rank nothing more can be read.
            why = "its connection has ended" if isinstance(error, EOFError) else describe(error)
            with self._news:
                follower.gone = why
                self._news.notify_all()

    def _take(self, follower: _Follower, body: bytes) -> None:
        kind, content = body[:1], body[1:]
        with self._news:
            if kind == _BEAT:
                follower.beats += 1
                follower.received, follower.done = _BEAT_WORDS.unpack(content)
            elif kind == _QUESTION:
                number, value = _ASKED_WORDS.unpack(content)
                follower.asked[number] = value
            elif kind == _FAILURE:
                follower.failure = pickle.loads(content)
            else:
                raise RepriseError(f"a follower said {kind!r}, which has no place here")
            self._news.notify_all()


class _Follower:
    """What the leader knows of one."""

    def __init__(self, connection: Sealed) -> None:
        self.connection = connection
        self.beats = 0
        self.received = 0
        self.done = 0
        self.asked: dict[int, float] = {}
        """Questions that it has asked and that were not answered yet, with what it says itself."""
        self.failure: Any = None
        self.gone: str | None = None


class FollowersLine:
    """A follower's end. A thread reads, so that the leader's end is noticed whatever is computed.

    Args:
        connection: To the leader.
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
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()
        self._asked = self._received = self._done = 0
        self._fell_out: str | None = None
        self._left = False
        threading.Thread(target=self._listen, name="reprise-line", daemon=True).start()

    def receive(self) -> bytes:
        """The next message, when there is one.

        Raises:
            RanksError: The leader is gone.
        """
        message = self._messages.get()
        if message is None:
            raise RanksError("the ranks have ended")
        self._received += 1
        return message

    def beat(self) -> None:
        """Say that this process runs, and how far it is."""
        self._say(_BEAT + _BEAT_WORDS.pack(self._received, self._done))

    def note_done(self, count: int) -> None:
        self._done = count

    def fail(self, error: BaseException | str) -> None:
        """Say what ended this rank."""
        self.beat()
        self._say(_FAILURE + sendable(error))

    def all(self, ok: bool) -> bool:
        """See :class:`reprise.distributed.Agreement`."""
        return self.largest(0.0 if ok else 1.0) == 0.0

    def largest(self, value: float) -> float:
        """See :class:`reprise.distributed.Agreement`.

        Raises:
            RanksError: The leader is gone, or did not answer in time.
        """
        self._asked += 1
        self._say(_QUESTION + _ASKED_WORDS.pack(self._asked, value))
        why, self._fell_out = self._fell_out, None
        patience = self.timeout if why is None else FELL_OUT_SECONDS
        try:
            answer = self._answers.get(timeout=patience)
        except queue.Empty:
            answer = None
            self.ended = True
        if answer is None:
            raise RanksError(
                f"{'' if why is None else f'{why}; '}the leader gave no answer within "
                f"{patience:.0f} s, or has ended; the group ends"
            )
        number, found = answer
        if number != self._asked:
            raise RanksError(f"question {self._asked} was answered with number {number}")
        return found

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
        with contextlib.suppress(OSError):  # the leader is gone, which the thread notices
            self._connection.send(body)

    def _listen(self) -> None:
        try:
            while True:
                body = self._connection.receive()
                if body[:1] == _MESSAGE:
                    self._messages.put(body[1:])
                elif body[:1] == _ANSWER:
                    self._answers.put(_ASKED_WORDS.unpack(body[1:]))
                else:
                    raise RepriseError(f"the leader said {body[:1]!r}, which has no place here")
        except (OSError, EOFError, RepriseError):
            self.ended = True
            self._messages.put(None)
            self._answers.put(None)
            if not self._left:
                self.on_end()

    def on_end(self) -> None:
        """Called by the thread when the leader is gone, before this rank has left."""
