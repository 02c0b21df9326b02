"""``python -m told STATUS``: a program that tells how it was started, and ends with this status;
with ``child`` behind it how a child of its own was, too."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def descriptors() -> dict[str, str]:
    """Kinds by number, but for sockets: one joins it to the nursery of its children."""
    found = dict[str, str]()
    for each in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd") / each
        if link.exists():  # not what the list was read by
            found[each] = os.readlink(link).partition(":")[0]
    return {number: kind for number, kind in found.items() if kind != "socket"}


def ends_with_parent() -> bool:
    """Whether the system sends this process a signal when its parent has ended."""
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0)
    return number.value == signal.SIGTERM


def leads_a_terminal() -> bool:
    """Whether keys of what it reads from become signals to it."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def stream(found: Any) -> list[Any] | None:
    """How Python has opened it, if there is one, and that it can be given other errors."""
    if found is None:
        return None
    told = [found.name, found.mode, found.encoding, found.errors, found.line_buffering]
    told += [found.write_through, type(found.buffer).__name__]
    found.reconfigure(errors="surrogateescape")
    return [*told, found.errors]


def facts() -> dict[str, Any]:
    """All that whoever starts a process decides."""
    found = {
        "arguments": sys.argv[1:],
        "shown": Path("/proc/self/cmdline").read_text().rstrip("\0").split("\0"),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "imports_from": sys.path,
        "parent": os.getppid(),
        "leads_a_session": os.getsid(0) == os.getpid(),
        "is_in_its_parents_group": os.getpgid(0) == os.getpgid(os.getppid()),
        "ends_with_parent": ends_with_parent(),
        "leads_a_terminal": leads_a_terminal(),
        "file": __file__,
        "streams": [stream(each) for each in (sys.stdin, sys.stdout, sys.stderr)],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "interrupted": str(signal.getsignal(signal.SIGINT)).partition(" at ")[0],
        "ended": str(signal.getsignal(signal.SIGTERM)),
        "descriptors": descriptors(),
        "input": sys.stdin and sys.stdin.read(),
    }
    if "child" in sys.argv:
        command = [sys.executable, "-P", "-m", "told", "0"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        found["child"] = json.loads(done.stdout)
        found["child"]["facts"]["parent"] -= os.getpid()
    return found


if __name__ == "__main__":
    # Of modules that a nursery itself needs this is one that nothing here does.
    print(json.dumps({"facts": facts(), "warm": "tempfile" in sys.modules}), flush=True)
    os._exit(int(sys.argv[1]))  # as an engine's processes do
