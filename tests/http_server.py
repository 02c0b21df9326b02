"""``reprise serve`` as a process, for tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import warm

START_SECONDS = 120


def until(condition: Callable[[], object], seconds: float = 100) -> None:
    """Wait for something to be so, however busy the machine is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Server:
    """A running ``reprise serve``."""

    def __init__(self, command: Sequence[str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *command], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            preexec_fn=warm.end_with_parent,
        )  # fmt: skip
        self._ready = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_SECONDS), self.log
        assert self.url, self.log
        port = self.url.rpartition(":")[2]
        self.port = int(port) if port.isdigit() else 0

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.match(r"ready: (\S+)", line)
            if found:
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def children(self) -> dict[str, list[int]]:
        """Process ids by module."""
        found: dict[str, list[int]] = {}
        for number, command in children(self.process.pid):
            name = "http" if "reprise.server.worker" in command else "engine"
            found.setdefault(name, []).append(number)
        return found

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._reader.join(10)


def children(pid: int) -> list[tuple[int, str]]:
    """Of a process: the id and the command of each, but for a nursery of the tests' own."""
    listed = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid=,args="], capture_output=True, text=True, check=False
    )
    pairs = (line.strip().partition(" ") for line in listed.stdout.splitlines())
    return [(int(number), command) for number, _, command in pairs if command != warm.IDLE]


def at_rest(pid: int) -> bool:
    """Whether a process and its children wait: what was sent to them they have read."""
    listed = [str(each) for each in (pid, *(number for number, _ in children(pid)))]
    found = subprocess.run(
        ["ps", "-p", ",".join(listed), "-o", "state="], capture_output=True, text=True, check=False
    )
    return all(state[0] in "SI" for state in found.stdout.split())


def replicas_of(pid: int) -> list[int]:
    """Process ids of a program's replicas, in their order."""
    return [number for number, command in children(pid) if "reprise.replicas.process" in command]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # meanwhile
        return True


Start = Callable[..., Server]
