"""A long command that is told to end, and says what it has found so far."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from reprise.cli.failures import EXIT_INTERRUPTED

EXIT_TERMINATED = 143
EXIT_TIME_LIMIT = 124
"""As of timeout(1)."""
GRACE_SECONDS = 10.0
"""How long the block has to end by itself."""

_STATUS = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}


class Ending:
    """Within the block Ctrl-C, SIGTERM and a time limit raise :class:`KeyboardInterrupt`.

    A call that never returns (a device that hangs, a lock) keeps Python from raising anything. Then
    a thread says the last words after :data:`GRACE_SECONDS`, and ends the process.

    Args:
        last_words: Called by that thread; tells what was found so far.
        time_limit: In seconds; None: there is none.
    """

    def __init__(self, last_words: Callable[[], None], time_limit: float | None = None) -> None:
        self._last_words, self._limit = last_words, time_limit
        self.status: int | None = None
        """What to exit with; None: no signal has said to end."""
        self.reason = ""
        """Why it ends, in words."""
        self._over = False

    def __enter__(self) -> Ending:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._before = {each: signal.signal(each, self._signalled) for each in _STATUS}
        # A handler runs when Python does; a byte comes here in any case.
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="ending", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        signal.set_wakeup_fd(self._wakeup)
        self._sender.close()
        self._thread.join()  # behind it, no signal of its own comes any more
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._receiver.close()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if not self._over:
            self._end(_STATUS[signal.Signals(number)], signal.Signals(number).name)
            raise KeyboardInterrupt

    def _end(self, status: int, reason: str) -> None:
        if self.status is None:
            self.status, self.reason = status, reason

    def _watch(self) -> None:
        number = self._wait(self._limit)
        if number == 0:
            return
        if number is None:
            self._end(EXIT_TIME_LIMIT, f"the time limit of {self._limit:g} s")
            if not self._over:
                signal.pthread_kill(self._main, signal.SIGINT)
        else:
            self._end(_STATUS[signal.Signals(number)], signal.Signals(number).name)
        until = time.monotonic() + GRACE_SECONDS
        while (number := self._wait(until - time.monotonic())) is not None:
            if number == 0:
                return
        assert self.status is not None
        self._last_words()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status)

    def _wait(self, seconds: float | None) -> int | None:
        """Wait for the next signal's number; 0: the block has ended; None: the time is over."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._receiver], [], [], left)[0]:
                return None
            got = self._receiver.recv(1)
            if not got:
                return 0
            if got[0] in _STATUS:
                return got[0]
