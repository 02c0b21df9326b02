"""What a close waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from reprise.parallel.processes import Processes
from reprise.processes.child import is_stopped

PATIENCE_SECONDS = 60.0


def started(code: str) -> Processes:
    """Followers that are one process, which runs this."""
    found = Processes.__new__(Processes)
    found._children = [subprocess.Popen([sys.executable, "-c", code], text=True)]
    return found


def test_a_follower_that_is_stopped_is_not_waited_for() -> None:
    """It would not end; and one close may have to wait for others."""
    followers = started("import time; time.sleep(600)")
    (child,) = followers._children
    try:
        os.kill(child.pid, signal.SIGSTOP)
        while not is_stopped(child.pid):
            time.sleep(0.01)
        began = time.monotonic()
        assert not followers.await_end(began + PATIENCE_SECONDS)
        assert time.monotonic() - began < PATIENCE_SECONDS / 2
    finally:
        child.kill()
        child.wait()


def test_followers_have_their_time_and_no_more() -> None:
    followers = started("")
    assert followers.await_end(time.monotonic() + PATIENCE_SECONDS)
    late = started("import time; time.sleep(600)")
    (child,) = late._children
    try:
        assert not late.await_end(time.monotonic() + 0.1)
    finally:
        child.kill()
        child.wait()


def test_signals_without_a_name_are_told_too() -> None:
    """Who watches must not end on one: nobody would learn that the rank is lost."""
    followers = started(f"import os; os.kill(os.getpid(), {signal.SIGRTMIN + 3})")
    (child,) = followers._children
    child.wait()
    followers._stopped = [0, 0]
    assert followers.fate(1) == f"its process was ended by signal {signal.SIGRTMIN + 3}"
