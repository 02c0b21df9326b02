"""The followers' processes: started, watched, ended."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from reprise.distributed.board import Board, create, failed
from reprise.distributed.ring import wake
from reprise.errors import RanksError
from reprise.platforms import usable_cpus
from reprise.processes.child import STOPPED_SECONDS, is_stopped

logger = logging.getLogger(__name__)

RING_BYTES = 4 << 20
WATCH_SECONDS = 0.1
"""Between two looks at the processes."""
SILENT_SECONDS = 30.0
"""A process of which no thread runs for so long counts as lost."""
LEAVE_SECONDS = 4.0
"""For so long a follower may take its leave."""
LOG_LINES = 30


class Processes:
    """Followers as processes on this machine, each joined to this one by pipes.

    Nothing of them outlives this process: the memory that they share has no name, and each ends
    when its pipe does.

    Args:
        size: Ranks, this process included.
        timeout: Seconds that a rank may take for one message.
    """

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self._timeout = size, timeout
        self.lost: RanksError | None = None
        """Why the group is over, if it was not ended on purpose."""
        self.on_loss: Callable[[], None] = lambda: None
        """Called once when a rank is lost, in a thread of its own."""
        self.report: Callable[[], str] = str
        """Says what the leader last told its followers."""
        self._closing = False
        self._lock = threading.Lock()
        memory = create(Board.nbytes(size, RING_BYTES))
        self.board = Board(memory, 0, size, RING_BYTES)
        self.board.timeout = timeout
        self._children: list[subprocess.Popen[str]] = []
        self._logs: list[deque[str]] = []
        self._readers: list[threading.Thread] = []
        self.wakers: list[int] = []
        life, self._life = os.pipe()
        try:
            for rank in range(1, size):
                self._start(rank, memory, life)
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(memory)
            os.close(life)
        self._watcher = threading.Thread(target=self._watch, name="reprise-ranks", daemon=True)
        self._watcher.start()

    def _start(self, rank: int, memory: int, life: int) -> None:
        woken, waker = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(waker, False)
        self.wakers.append(waker)
        command = [
            sys.executable, "-m", "reprise.follower", "--rank", str(rank), "--size",
            str(self.size), "--memory", str(memory), "--ring-bytes", str(RING_BYTES),
            "--woken", str(woken), "--life", str(life),
        ]  # fmt: skip
        # In a session of its own: a terminal's signals are for the leader.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            pass_fds=(memory, woken, life), env=rank_environment(self.size), start_new_session=True,
        )  # fmt: skip
        os.close(woken)
        self._children.append(child)
        log: deque[str] = deque(maxlen=LOG_LINES)
        self._logs.append(log)
        assert child.stderr is not None
        reader = threading.Thread(
            target=_follow, args=(rank, child.stderr, log), name=f"reprise-rank-{rank}", daemon=True
        )
        reader.start()
        self._readers.append(reader)

    # ---- watching ------------------------------------------------------------------------

    def _watch(self) -> None:
        # Looks are counted, not seconds: this process may have been stopped itself.
        stopped = [0] * self.size
        silent = [0] * self.size
        beats = [0] * self.size
        behind = [0] * self.size
        done = [0] * self.size
        while not self._closing:
            for rank, child in enumerate(self._children, 1):
                reason = self._ended(rank, child)
                stopped[rank] = stopped[rank] + 1 if is_stopped(child.pid) else 0
                new = self.board.beats(rank)
                silent[rank] = silent[rank] + 1 if new and new == beats[rank] else 0
                beats[rank] = new
                carried = self.board.done(rank)
                waits = self.board.sent > carried and carried == done[rank]
                behind[rank] = behind[rank] + 1 if waits else 0
                done[rank] = carried
                if stopped[rank] * WATCH_SECONDS > STOPPED_SECONDS:
                    reason = reason or "its process was stopped by a signal"
                if silent[rank] * WATCH_SECONDS > SILENT_SECONDS:
                    reason = reason or f"its process has not run for {SILENT_SECONDS:.0f} s"
                if behind[rank] * WATCH_SECONDS > self._timeout:
                    reason = reason or f"it has done nothing for {self._timeout:.0f} s"
                if reason is not None and not self._closing:
                    self._lose(rank, reason)
                    return
            time.sleep(WATCH_SECONDS)

    def _ended(self, rank: int, child: subprocess.Popen[str]) -> str | None:
        told = self.board.failure(rank)
        if told is not None:
            return str(failed(rank, told)).removeprefix(f"rank {rank}: ")
        code = child.poll()
        if code is None:
            return None
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"

    def _lose(self, rank: int, reason: str) -> None:
        board = self.board
        state = f"message {board.received(rank)} of {board.sent}"
        told = board.failure(rank)
        child = self._children[rank - 1]
        self.board.end()
        self.kill()  # what waits for it ends, too
        self._readers[rank - 1].join(1.0)
        log = "".join(f"\n  {line}" for line in self._logs[rank - 1])
        text = (
            f"rank {rank} (process {child.pid}) of {self.size} was lost: {reason}. It had got "
            f"{state} ({self.report()}). Create a new engine."
        )
        self.lost = RanksError(text + (f" The last lines of its log:{log}" if log else ""))
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

    def close(self, leave: Callable[[], None] | None = None) -> None:
        """End all followers.

        Args:
            leave: Tells them to go, for which they get some seconds; None: they get none.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if self.lost is None and leave is not None:
            try:
                leave()
                until = time.monotonic() + LEAVE_SECONDS
                for child in self._children:
                    child.wait(max(0.0, until - time.monotonic()))
            except (RanksError, subprocess.TimeoutExpired) as error:
                logger.warning("ranks: not all followers took their leave (%s)", error)
        self.board.end()
        self.kill()
        for each in (self._life, *self.wakers):
            os.close(each)
        if threading.current_thread() is not self._watcher:
            self._watcher.join()

    def kill(self) -> None:
        """End every follower at once, and wait until it is gone."""
        for child, waker in zip(self._children, self.wakers, strict=False):
            if child.poll() is None:
                wake(waker)
                child.kill()
        for child in self._children:
            child.wait()


def rank_environment(size: int) -> dict[str, str]:
    """Of a process that is one of ``size`` ranks on this machine: it imports what this one does."""
    root = str(Path(__file__).resolve().parents[2])
    paths = dict.fromkeys([root, *(each for each in sys.path if each)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # As ``Platform.share_host`` gives the leader; here before the process makes its threads.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus()[0] // size)))
    return environment


def _follow(rank: int, stream: IO[str], log: deque[str]) -> None:
    """Pass a follower's log on, line by line."""
    with stream:
        for line in stream:
            log.append(line.rstrip())
            sys.stderr.write(f"[rank {rank}] {line}")
