"""The process that compiles Triton's kernels for another one: ``python -m reprise.kernel_compiler
SOCKET MOST``, where the socket's packets are jobs and answers; :mod:`reprise.kernels_beside` is the
other side.

It imports what kernels are made of and forks itself for each job, so that what one breaks no other
finds broken, and the system's table of processes is all that it has to watch. The kernels of this
package it imports while nothing is asked for, and that of a job before it forks. No device is
touched: a job says what is compiled for.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NoReturn

from reprise import early
from reprise.kernels_beside import Job, module_of, unpacked

if TYPE_CHECKING:
    from reprise.ops.implementation import Implementation

LOOK_SECONDS = 1.0
"""Between two looks at whether the parent is still there, should its socket be held by a child."""
IDLE_SECONDS = 300.0
"""Without a job until it ends."""
ERROR = 2000
"""Characters of an error that are told."""


def main() -> None:
    """Import, then fork for each job until the other process is gone."""
    gc.disable()  # a look through all that is imported takes as long as many an import
    connection = socket.socket(fileno=int(sys.argv[1]))
    parent = os.getppid()
    fingerprinting = threading.Thread(target=early.prepare_compiler)
    fingerprinting.start()
    from reprise.ops import all_ops

    implementations = (each for op in all_ops().values() for each in op.implementations.values())
    unimported = deque(each for each in implementations if each.compiles)
    # Behind torch, where no two threads begin to import Triton.
    importlib.import_module("triton.compiler.code_generator")
    fingerprinting.join()
    connection.send(json.dumps({"ready": True}).encode())
    _Server(connection, int(sys.argv[2]), parent, unimported).run()


def _import_kernels(of: Implementation) -> None:
    # One that does not import is named by the process that needs it.
    with contextlib.suppress(Exception):
        of.function  # noqa: B018 - imports


class _Server:
    def __init__(
        self,
        connection: socket.socket,
        most: int,
        parent: int,
        unimported: deque[Implementation],
    ) -> None:
        self._connection, self._most, self._parent = connection, most, parent
        self._unimported = unimported
        """Whose kernels are imported while there is nothing else to do."""
        self._waiting: deque[bytes] = deque()
        self._running: dict[int, int] = {}
        self._idle_since = time.monotonic()
        self._ended, ends = os.pipe()
        for each in (self._ended, ends):
            os.set_blocking(each, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ends, warn_on_full_buffer=False)

    def run(self) -> None:
        while True:
            seconds = 0.0 if self._unimported else LOOK_SECONDS
            descriptors = [self._connection.fileno(), self._ended]
            found, _, _ = select.select(descriptors, [], [], seconds)
            if not found and self._unimported:
                _import_kernels(self._unimported.popleft())
            if self._connection.fileno() in found:
                job = self._connection.recv(1 << 20)
                if not job:
                    break
                self._waiting.append(job)
            if self._ended in found:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._ended, 1 << 12)
            self._reap()
            self._start()
            if os.getppid() != self._parent or self._is_idle():
                break
        os.killpg(0, signal.SIGKILL)

    def _is_idle(self) -> bool:
        if self._running:
            self._idle_since = time.monotonic()
        return time.monotonic() - self._idle_since > IDLE_SECONDS

    def _reap(self) -> None:
        for pid in list(self._running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                number = self._running.pop(pid)
                if status:
                    code = os.waitstatus_to_exitcode(status)
                    how = f"signal {-code}" if code < 0 else f"status {code}"
                    _answer(self._connection, number, 0.0, f"its compiler ended with {how}")

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._most:
            job = self._waiting.popleft()
            number, job = int.from_bytes(job[:8], "little"), job[8:]
            with contextlib.suppress(Exception):  # its compiler says so
                importlib.import_module(module_of(job))
            gc.freeze()  # children look at none of it
            pid = os.fork()
            if not pid:
                self._compile(number, job)
            self._running[pid] = number

    def _compile(self, number: int, job: bytes) -> NoReturn:
        """In a child: nothing of the parent's is cleaned up."""
        gc.enable()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        began = time.monotonic()
        try:
            compile_job(unpacked(job))
            error = None
        except BaseException as failed:
            error = f"{type(failed).__name__}: {failed}"[:ERROR]
        with contextlib.suppress(OSError):
            _answer(self._connection, number, time.monotonic() - began, error)
        os._exit(0)


def _answer(connection: socket.socket, number: int, seconds: float, error: str | None) -> None:
    said = {"job": number, "seconds": seconds, "error": error}
    connection.send(json.dumps(said).encode())


def compile_job(job: Job) -> None:
    """Compile it into Triton's cache. Raises what Triton does."""
    import triton

    for place, value in job.settings.items():
        group, _, name = place.partition(".")
        setattr(getattr(triton.knobs, group), name, value)
    source = triton.compiler.ASTSource(job.kernel, job.signature, job.constants, job.attrs)
    if job.launcher is not None:
        job.launcher(source, _Unknown())
    else:
        triton.compiler.compile(source, target=job.target, options=job.options)


class _Unknown:
    """Of a kernel that is not compiled yet: a launcher's code does not depend on it."""

    def __getattr__(self, name: str) -> None:
        return None


if __name__ == "__main__":
    main()
