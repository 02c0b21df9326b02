"""Between hosts, what :mod:`reprise.distributed.board` and :mod:`reprise.distributed.ring` are on
one: messages from the leader in one order, answers that all agree on, and which rank has failed.

Each follower has one connection to the leader, which asks none that has not asked itself
(:mod:`reprise.distributed.star`).
"""

from __future__ import annotations

import queue
import struct
from collections.abc import Mapping

from reprise.distributed.star import BEAT, MESSAGE, Hub, Spoke
from reprise.errors import RanksError
from reprise.processes.sealed import Sealed

_BEAT_WORDS = struct.Struct("<QQ")
"""Messages received, messages carried out."""


class LeadersLine(Hub):
    """The leader's end of all connections. One thread asks and sends.

    Args:
        connections: Of each follower, by its rank.
        timeout: Seconds that the leader waits for an answer.
    """

    def __init__(self, connections: Mapping[int, Sealed], timeout: float) -> None:
        self.sent = 0
        """Messages so far."""
        self._beats = dict.fromkeys(connections, 0)
        self._states = dict.fromkeys(connections, (0, 0))
        super().__init__(connections, timeout)

    def send(self, message: bytes) -> None:
        """Give every follower a message.

        Raises:
            RanksError: A follower cannot be reached.
        """
        self.sent += 1
        for rank in self._others:
            self._say(rank, MESSAGE + message)

    def beats(self, rank: int) -> int:
        """Changes while a rank's process runs."""
        return self._beats[rank]

    def received(self, rank: int) -> int:
        """Messages that a rank has taken, as it said last."""
        return self._states[rank][0]

    def done(self, rank: int) -> int:
        """Messages that a rank has carried out, as it said last."""
        return self._states[rank][1]

    def _take(self, rank: int, kind: bytes, content: bytes) -> None:
        if kind != BEAT:
            super()._take(rank, kind, content)
            return
        self._beats[rank] += 1
        received, done = _BEAT_WORDS.unpack(content)
        self._states[rank] = received, done


class FollowersLine(Spoke):
    """A follower's end. A thread reads, so that the leader's end is noticed whatever is computed.

    Args:
        connection: To the leader.
        rank: Ours.
        size: Ranks there are.
    """

    def __init__(self, connection: Sealed, rank: int, size: int) -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._received = self._done = 0
        super().__init__(connection, rank, size)

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
        self._say(BEAT + _BEAT_WORDS.pack(self._received, self._done))

    def note_done(self, count: int) -> None:
        self._done = count

    def fail(self, error: BaseException | str) -> None:
        """Say what ended this rank."""
        self.beat()
        super().fail(error)

    def _hear(self, kind: bytes, content: bytes) -> None:
        if kind == MESSAGE:
            self._messages.put(content)
        else:
            super()._hear(kind, content)

    def _over(self) -> None:
        self._messages.put(None)
        if not self._left:
            self.on_end()

    def on_end(self) -> None:
        """Called by the thread when the leader is gone, before this rank has left."""
