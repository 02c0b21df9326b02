"""The followers, as the leader has them: watched, and ended."""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from reprise.distributed import Agreement
from reprise.distributed.board import failed
from reprise.errors import RanksError

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1
"""Between two looks at the processes."""
SILENT_SECONDS = 30.0
"""A process of which no thread runs for so long counts as lost."""
LEAVE_SECONDS = 4.0
"""For so long a follower may take its leave."""


class Board(Agreement, Protocol):
    """What the leader sees of all ranks, whatever carries it."""

    sent: int
    """Messages that the leader has sent so far."""

    def end(self) -> None:
        """The group is over: nobody is to wait for anybody."""

    def note_calls(self, count: int) -> None:
        """Say how many collectives the leader has begun."""

    def beats(self, rank: int) -> int:
        """Changes while a rank's process runs."""

    def received(self, rank: int) -> int:
        """Messages that a rank has taken."""

    def done(self, rank: int) -> int:
        """Messages that a rank has carried out."""

    def failure(self, rank: int) -> Any:
        """The error or the words with which a rank ended; None: it has not."""


class Followers(ABC):
    """All of one engine's, from their start to their end.

    Args:
        board: What is seen of them.
        timeout: Seconds that a rank may take for one message.
    """

    def __init__(self, board: Board, timeout: float) -> None:
        self.board: Board = board
        self.size, self._timeout = board.size, timeout
        self.lost: RanksError | None = None
        """Why the group is over, if it was not ended on purpose."""
        self.missing: int | None = None
        """The rank that was lost, if it could not say why itself."""
        self.on_loss: Callable[[], None] = lambda: None
        """Called once when a rank is lost, in a thread of its own."""
        self.report: Callable[[], str] = str
        """Says what the leader last told its followers."""
        self._closing = False
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._process = os.getpid()

    @abstractmethod
    def send(self, message: bytes) -> None:
        """Give every follower a message, in order.

        Raises:
            RanksError: A follower has failed, or reads nothing.
        """

    @abstractmethod
    def fate(self, rank: int) -> str | None:
        """How a rank's process has ended, or why it counts as lost; None: it has not. Asked at each
        look."""

    @abstractmethod
    def called(self, rank: int) -> str:
        """Which process, for people."""

    @abstractmethod
    def log(self, rank: int) -> str:
        """The end of the log of a rank that is lost, or where it is; empty: there is none."""

    @abstractmethod
    def await_end(self, until: float) -> bool:
        """Whether all have ended by themselves by then; at once if some never will."""

    @abstractmethod
    def kill(self) -> None:
        """End every follower at once, and wait until it is gone."""

    def free(self) -> None:  # noqa: B027 - there may be nothing
        """Give back what this process has of them."""

    @property
    def are_of_parent(self) -> bool:
        """This process was forked by the one that leads them, and ends without them."""
        return os.getpid() != self._process

    # ---- watching ------------------------------------------------------------------------

    def watch(self) -> None:
        """Begin to look at them, in a thread."""
        self._watcher = threading.Thread(target=self._watch, name="reprise-ranks", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        # Looks are counted, not seconds: this process may have been stopped itself.
        silent = [0] * self.size
        beats = [0] * self.size
        behind = [0] * self.size
        done = [0] * self.size
        while not self._closing and self.lost is None:
            for rank in range(1, self.size):
                told = self.board.failure(rank)
                fate = self.fate(rank)
                reason = fate if told is None else _said(rank, told)
                new = self.board.beats(rank)
                silent[rank] = silent[rank] + 1 if new and new == beats[rank] else 0
                beats[rank] = new
                carried = self.board.done(rank)
                waits = self.board.sent > carried and carried == done[rank]
                behind[rank] = behind[rank] + 1 if waits else 0
                done[rank] = carried
                if silent[rank] * WATCH_SECONDS > SILENT_SECONDS:
                    reason = reason or f"its process has not run for {SILENT_SECONDS:.0f} s"
                if behind[rank] * WATCH_SECONDS > self._timeout:
                    reason = reason or f"it has done nothing for {self._timeout:.0f} s"
                if reason is not None and not self._closing:
                    self._lose(rank, reason)
                    return
            time.sleep(WATCH_SECONDS)

    def give_up(self, error: RanksError) -> None:
        """The group is over, for a reason of the leader's."""
        self.lost = error
        self.board.end()
        self.kill()

    def _lose(self, rank: int, reason: str) -> None:
        board = self.board
        state = f"message {board.received(rank)} of {board.sent}"
        told = board.failure(rank)
        board.end()
        self.kill()  # what waits for it ends, too
        text = (
            f"rank {rank} ({self.called(rank)}) of {self.size} was lost: {reason}. It had got "
            f"{state} ({self.report()}). Create a new engine."
        )
        log = self.log(rank)
        if self.lost is not None:
            return  # the leader has given it up
        self.missing = rank if told is None else None
        self.lost = RanksError(f"{text} {log}" if log else text)
        self.lost.__cause__ = told if isinstance(told, BaseException) else None
        logger.critical("%s", self.lost)
        # It may wait for a device that never answers; nobody waits for it.
        threading.Thread(target=self.on_loss, name="reprise-loss", daemon=True).start()

    def cause(self, error: BaseException | None = None, seconds: float = 0.0) -> RanksError | None:
        """Why the group is over; if it may be so for a reason not seen yet, wait so long."""
        until = time.monotonic() + seconds
        while self.lost is None and not self._closing and time.monotonic() < until:
            time.sleep(WATCH_SECONDS / 4)
        return self.lost

    # ---- the end -------------------------------------------------------------------------

    def close(self, leave: Callable[[], None] | None = None, until: float = 0.0) -> None:
        """End all followers.

        Args:
            leave: Tells them to go, for which they get some seconds; None: they get none.
            until: By when they have to be gone, as ``time.monotonic`` says.
        """
        if self.are_of_parent:
            return
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if self.lost is None and leave is not None:
            reason = "not all in time"
            try:
                leave()
                left = self.await_end(min(until, time.monotonic() + LEAVE_SECONDS))
            except RanksError as error:
                left, reason = False, str(error)
            if not left:
                logger.warning("ranks: not all followers took their leave (%s)", reason)
        self.board.end()
        self.kill()
        self.free()
        if self._watcher is not None and threading.current_thread() is not self._watcher:
            self._watcher.join()


def _said(rank: int, told: Any) -> str:
    return str(failed(rank, told)).removeprefix(f"rank {rank}: ")
