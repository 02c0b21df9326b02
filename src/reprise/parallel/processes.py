"""Followers as processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from reprise.distributed.board import Board, create
from reprise.distributed.ring import Writer, wake
from reprise.parallel.followers import WATCH_SECONDS, Followers
from reprise.platforms import usable_cpus
from reprise.processes.child import STOPPED_SECONDS, is_stopped, signal_name

RING_BYTES = 4 << 20
LOG_LINES = 30


class Processes(Followers):
    """Followers as processes on this machine, each joined to this one by pipes.

    Nothing of them outlives this process: the memory that they share has no name, and each ends
    when its pipe does.

    Args:
        size: Ranks, this process included.
        timeout: Seconds that a rank may take for one message.
        keep: Descriptors that followers inherit beside.
    """

    def __init__(self, size: int, timeout: float, keep: Sequence[int] = ()) -> None:
        memory = create(Board.nbytes(size, RING_BYTES))
        board = Board(memory, 0, size, RING_BYTES)
        board.timeout = timeout
        super().__init__(board, timeout)
        self._keep = tuple(keep)
        self._stopped = [0] * size
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
        self._writer = Writer(board, self.wakers)
        self.watch()

    def send(self, message: bytes) -> None:
        self._writer.send(message)

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
            pass_fds=(memory, woken, life, *self._keep),
            env=rank_environment(self.size), start_new_session=True,
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

    def fate(self, rank: int) -> str | None:
        child = self._children[rank - 1]
        code = child.poll()
        # Looks are counted, not seconds: this process may have been stopped itself.
        self._stopped[rank] = self._stopped[rank] + 1 if is_stopped(child.pid) else 0
        if code is None:
            stopped = self._stopped[rank] * WATCH_SECONDS > STOPPED_SECONDS
            return "its process was stopped by a signal" if stopped else None
        if code < 0:
            return f"its process was ended by {signal_name(-code)}"
        return f"its process ended with exit code {code}"

    def called(self, rank: int) -> str:
        return f"process {self._children[rank - 1].pid}"

    def log(self, rank: int) -> str:
        self._readers[rank - 1].join(1.0)
        lines = "".join(f"\n  {line}" for line in self._logs[rank - 1])
        return f"The last lines of its log:{lines}" if lines else ""

    # ---- the end -------------------------------------------------------------------------

    def await_end(self, until: float) -> bool:
        while left := [each for each in self._children if each.poll() is None]:
            if time.monotonic() > until or any(is_stopped(each.pid) for each in left):
                return False
            time.sleep(WATCH_SECONDS / 8)
        return True

    def kill(self) -> None:
        for child, waker in zip(self._children, self.wakers, strict=False):
            if child.poll() is None:
                wake(waker)
                child.kill()
        for child in self._children:
            child.wait()

    def free(self) -> None:
        for each in (self._life, *self.wakers):
            os.close(each)


def rank_environment(size: int) -> dict[str, str]:
    """Variables of a process that is one of ``size`` ranks on this machine: it imports what this
    one does."""
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
