"""Messages from the leader to all other ranks, in one order, through shared memory.

A message is four bytes of length and its content. One that is longer than the ring goes through it
in pieces.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Callable, Sequence

from reprise.distributed.board import SPIN_SECONDS, Board, pause
from reprise.errors import RanksError

_LENGTH = struct.Struct("<I")
SLEEP_SECONDS = 0.05
"""For so long a reader sleeps at most: a wake-up that crosses its falling asleep is lost."""
LOST_SECONDS = 2.0
"""A message that was sent and is not there for so long does not come any more."""


class Writer:
    """The leader's end.

    Args:
        board: The shared memory.
        wakers: File descriptors to write to, one for each follower: it wakes it.
    """

    def __init__(self, board: Board, wakers: Sequence[int]) -> None:
        self._board, self._wakers = board, wakers
        self._head = 0

    def send(self, message: bytes) -> None:
        """Give every follower a message.

        Raises:
            RanksError: A follower has failed, or reads nothing.
        """
        if len(message) >= 1 << 32:
            raise RanksError(f"a message of {len(message)} bytes is too long to be sent to ranks")
        self._write(_LENGTH.pack(len(message)) + message)
        self._board.sent += 1
        self._board.fence()
        for rank, waker in enumerate(self._wakers, 1):
            if self._board.asleep(rank):
                wake(waker)

    def _write(self, content: bytes) -> None:
        board, ring = self._board, self._board.ring
        size, left = len(ring), memoryview(content)
        began = time.monotonic()
        while left:
            tails = [board.tail(rank) for rank in range(1, board.size)]
            room = size - (self._head - min(tails, default=self._head))
            if room == 0:
                waited = time.monotonic() - began
                if waited > board.timeout:
                    slow = 1 + tails.index(min(tails))
                    raise RanksError(f"rank {slow} has read nothing for {board.timeout:.0f} s")
                board.check()
                pause(waited)
                continue
            begin = self._head % size
            count = min(room, len(left), size - begin)
            ring[begin : begin + count] = left[:count]
            self._head += count
            board.head = self._head
            left = left[count:]


class Reader:
    """A follower's end.

    Args:
        board: The shared memory.
        waker: File descriptor that is written to when there is something to read.
        alive: Raises when nothing will come any more.
    """

    def __init__(self, board: Board, waker: int, alive: Callable[[], None]) -> None:
        self._board, self._waker, self._alive = board, waker, alive
        self._tail = 0
        self._count = 0

    def receive(self) -> bytes:
        """The next message, when there is one.

        Raises:
            RanksError: One was lost, or a rank has failed.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        message = self._read(length)
        self._count += 1
        self._board.note_received(self._count)
        return message

    def _read(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            available = self._board.head - self._tail
            if available == 0:
                self._wait()
                continue
            self._board.fence()
            ring = self._board.ring
            begin = self._tail % len(ring)
            end = begin + min(available, count - len(found), len(ring) - begin)
            found += ring[begin:end]
            self._tail += end - begin
            self._board.read_up_to(self._tail)
        return bytes(found)

    def _wait(self) -> None:
        """Until there is something to read: awake for a moment, then asleep."""
        board, began = self._board, time.monotonic()
        while board.head == self._tail:
            waited = time.monotonic() - began
            if waited < SPIN_SECONDS:
                pause(waited)
                continue
            self._alive()
            board.check()
            if waited > LOST_SECONDS and board.sent > self._count:
                raise RanksError(
                    f"message {self._count + 1} of {board.sent} from the leader was lost"
                )
            board.fall_asleep(True)
            if board.head == self._tail:
                select.select([self._waker], [], [], SLEEP_SECONDS)
            board.fall_asleep(False)
            _drain(self._waker)


def wake(waker: int) -> None:
    """Wake the reader at the other end; one wake-up is as good as many."""
    try:
        os.write(waker, b"\0")
    except (BlockingIOError, BrokenPipeError):  # it is awake already, or gone
        return


def _drain(waker: int) -> None:
    try:
        while os.read(waker, 4096):
            pass
    except BlockingIOError:
        return
