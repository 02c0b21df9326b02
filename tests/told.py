"""``python -m told STATUS``: a program that tells how it was started, and ends with this status;
with ``child`` behind it how a child of its own was, too."""

from __future__ import annotations

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
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "interrupted": str(signal.getsignal(signal.SIGINT)).partition(" at ")[0],
        "ended": str(signal.getsignal(signal.SIGTERM)),
        "descriptors": descriptors(),
        "input": sys.stdin.read(),
    }
    if "child" in sys.argv:
        command = [sys.executable, "-P", "-m", "told", "0"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        found["child"] = json.loads(done.stdout)
        found["child"]["facts"]["parent"] -= os.getpid()
    return found


if __name__ == "__main__":
    print(json.dumps({"facts": facts(), "warm": "torch" in sys.modules}), flush=True)
    os._exit(int(sys.argv[1]))  # as an engine's processes do
