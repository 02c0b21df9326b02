"""Engines' threads that a program leaves behind, when it ends and in a process that it forks."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from typing import Protocol

EXIT_SECONDS = 10.0
"""For all of them to end: more than the close of one engine waits."""


class Thread(Protocol):
    """What is asked of one."""

    def stop(self) -> None:
        """Have it end, without waiting for it."""

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, at most so many seconds."""

    def forked(self) -> None:
        """Take note that this process is a fork: the thread runs in its parent."""


_living: weakref.WeakSet[Thread] = weakref.WeakSet()


def add(thread: Thread) -> None:
    """From now on this thread is ended with the program; its engine is there, and has registered
    what it needs."""
    _living.add(thread)
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)  # what the engine has registered itself comes behind it


def _after_fork() -> None:
    for each in _living:
        each.forked()


def _at_exit() -> None:
    """Python ends threads that are still in a library's code by unwinding it, for which most of
    that code is not made: it aborts the process."""
    until, living = time.monotonic() + EXIT_SECONDS, list(_living)
    for each in living:
        each.stop()
    for each in living:
        each.join(max(0.0, until - time.monotonic()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
