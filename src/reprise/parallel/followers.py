"""The followers, as the leader has them: watched, and ended."""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from reprise.distributed import Agreement
from reprise.distributed.board import failed
from reprise.errors import RanksError, RepriseError

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1
"""Between two looks at the processes."""
SILENT_SECONDS = 30.0
"""A process of which no thread runs for so long counts as lost."""
SETTLE_SECONDS = 0.3
"""For so long what a rank says of its failure may have another rank's end as its reason, which is
not seen yet."""
LEAVE_SECONDS = 4.0
"""For so long a follower may take its leave."""


class Board(Agreement, Protocol):
    """What the leader sees of all ranks, whatever carries it."""

    sent: int
    """Messages that the leader has sent so far."""

    def end(self) -> None:
        """The group is over: no rank is to wait for another one."""

    def note_calls(self, count: int) -> None:
        """Say how many collectives the leader has begun."""

    def beats(self, rank: int) -> int:
        """Changes while a rank's process runs."""

    def received(self, rank: int) -> int:
        """Messages that a rank has taken."""

    def done(self, rank: int) -> int:
        """Messages that a rank has carried out."""

    def calls(self, rank: int) -> int:
        """Collectives that a rank has begun; 0: it is not known."""

    def failure(self, rank: int) -> Any:
        """The error or the words with which a rank ended; None: it has not."""

    @property
    def first_failure(self) -> int | None:
        """The rank that failed first; None: none has, or it is not known."""


class Looks:
    """What of all followers is seen in turn, and which of them is the reason if the group is over.

    A rank that waits for one that is gone fails as well, and may say so before it is seen that the
    other one is gone; and of those that do nothing, most wait for one.

    Args:
        size: Ranks, the leader included.
        timeout: Seconds that a rank may take for one message.
    """

    def __init__(self, size: int, timeout: float) -> None:
        self._ranks, self._timeout = range(1, size), timeout
        self._silent = [0] * size
        """For how many looks a rank has not run."""
        self._behind = [0] * size
        """For how many looks it has carried out nothing."""
        self._beats = [0] * size
        self._done = [0] * size
        self._told = 0
        """For how many looks one has said that it failed."""

    def look(self, board: Board, fates: Mapping[int, str | None]) -> tuple[int, str] | None:
        """The follower that is lost, and why, if the reason is seen by now.

        Args:
            board: What is seen of all.
            fates: Of each follower, how its process has ended.
        """
        told = {rank: found for rank in self._ranks if (found := board.failure(rank)) is not None}
        for rank in self._ranks:
            self._note(board, rank)
            reason = fates[rank]
            if self._silent[rank] * WATCH_SECONDS > SILENT_SECONDS:
                reason = reason or f"its process has not run for {SILENT_SECONDS:.0f} s"
            if reason is not None and rank not in told:
                return rank, reason
        if told:
            self._told += 1
            first = board.first_failure
            rank = first if first in told else min(told)
            if not _may_be_others(rank, told[rank]) or self._told * WATCH_SECONDS > SETTLE_SECONDS:
                return rank, _said(rank, told[rank])
        late = [r for r in self._ranks if self._behind[r] * WATCH_SECONDS > self._timeout]
        if not late:
            return None
        # A rank that waits for another one in a collective has begun more of them.
        rank = min(late, key=lambda each: (board.done(each), board.calls(each)))
        return rank, f"it has done nothing for {self._timeout:.0f} s"

    def _note(self, board: Board, rank: int) -> None:
        new, carried = board.beats(rank), board.done(rank)
        self._silent[rank] = self._silent[rank] + 1 if new and new == self._beats[rank] else 0
        waits = board.sent > carried and carried == self._done[rank]
        self._behind[rank] = self._behind[rank] + 1 if waits else 0
        self._beats[rank], self._done[rank] = new, carried


def _may_be_others(rank: int, told: Any) -> bool:
    """Whether another rank's end may be why this one has failed: a collective's error has no type
    of ours."""
    if isinstance(told, RanksError):
        return told.rank != rank
    return not isinstance(told, RepriseError)


class Followers(ABC):
    """All followers of one engine, from their start to their end.

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
        looks = Looks(self.size, self._timeout)
        while not self._closing and self.lost is None:
            fates = {rank: self.fate(rank) for rank in range(1, self.size)}
            found = looks.look(self.board, fates)
            if found is not None and not self._closing:
                self._lose(*found)
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
        # It may wait for a device that never answers; no process waits for it.
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
