"""A process that this one has started, and the way to speak with it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from reprise.processes.control import Control

logger = logging.getLogger(__name__)

STOPPED_SECONDS = 3.0
"""A process that is stopped for so long is taken for lost. Ctrl-Z stops parent and children, which
wake together."""


_PARENTS = (signal.SIGINT, signal.SIGTERM)


def leave_signals_to_parent() -> None:
    """In a child: the parent says when to end. Until then they are blocked, from its start on."""
    for number in _PARENTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENTS)


def begin() -> tuple[Control, Any]:
    """The connection to the parent and what it says first, behind ``python -m MODULE FD``: the
    number of the control socket."""
    leave_signals_to_parent()
    control = Control(socket.socket(fileno=int(sys.argv[1])))
    return control, json.loads(control.receive_text())


class Child:
    """A process and the way to speak with it.

    It imports what this process does and nothing of the user's program, so that one needs no
    ``if __name__ == "__main__"``.

    Args:
        name: For messages.
        command: Arguments of Python; the number of the control socket's descriptor is added.
        start: What it is told first.
        keep: Descriptors that it inherits beside.
        variables: Of its environment, beside ours.
        output: Gets its standard output and error; None: ours.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        start: str,
        keep: Sequence[int] = (),
        variables: Mapping[str, str] | None = None,
        output: IO[Any] | None = None,
    ) -> None:
        self.name = name
        self.started = time.monotonic()
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            # Ctrl-C goes to all processes of a terminal: to a child that still imports, too.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", *command, str(number)],
                    pass_fds=[number, *keep],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**environment(), **(variables or {})},
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.control = Control(ours)
        self._stopped_since: float | None = None
        self._looked_at = 0.0
        self.tell_text(Control.START, start)

    def tell_text(self, word: bytes, text: str) -> None:
        with contextlib.suppress(OSError):  # it has died, which is noticed elsewhere
            self.control.send_text(word, text)

    def stop(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(OSError):
            self.control.send(Control.STOP)

    def end(self, seconds: float) -> int:
        """Wait for its end, and kill it if it takes longer. Returns its status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            logger.warning("%s does not end within %.0f s: it is killed", self.name, seconds)
            self.process.kill()
            return self.process.wait()
        finally:
            self.control.connection.close()

    def kill(self) -> None:
        """End it now."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.control.connection.close()

    @property
    def stands_still(self) -> bool:
        """Whether it was stopped (SIGSTOP) and has been for :data:`STOPPED_SECONDS`, in which this
        was asked time and again: not while this process was stopped as well."""
        now = time.monotonic()
        gap, self._looked_at = now - self._looked_at, now
        if not is_stopped(self.process.pid):
            self._stopped_since = None
        elif self._stopped_since is None or gap > 2:
            self._stopped_since = now
        return self._stopped_since is not None and now - self._stopped_since >= STOPPED_SECONDS

    @property
    def was_killed(self) -> bool:
        """A signal has ended it."""
        status = self.process.poll()
        return status is not None and status < 0

    @property
    def fate(self) -> str:
        """How it ended, for people."""
        status = self.process.returncode
        if status is not None and status < 0:
            return f"by signal {-status} ({signal_name(-status)})"
        return f"with status {status}"


def signal_name(number: int) -> str:
    """Some have a number alone, of those that programs may use as they like."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a child of this process, as the system tells a parent; the child
    stays to be waited for."""
    try:
        found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except (ChildProcessError, AttributeError):  # it was waited for; there is no waitid
        return False
    return found is not None and found.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED)


def environment() -> dict[str, str]:
    """Ours, so that children import what this process has imported."""
    home = str(Path(__file__).parents[2])
    known = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    paths = known if home in known else [home, *known]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
