"""Triton's kernels, compiled by processes of their own: this process's side.

Triton generates a kernel's code in Python, so threads that compile many wait for one another, and
all else for them. A process beside (``python -m reprise.kernel_compiler``) imports what kernels are
made of while this one imports torch, and forks itself for each kernel that it is asked for. What
comes of it lies in Triton's cache of kernels, where the process that asked finds it.

The process ends when this one does, however it does, or when it was asked nothing for a while. It
holds nothing of this one but its end of a socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from reprise.cpu_limits import usable_cpus
from reprise.errors import RepriseError
from reprise.processes.child import environment

logger = logging.getLogger(__name__)

SAID = 1 << 16
"""Bytes that an answer has at most."""
FEWEST_CPUS = 2
"""With which a process beside is worth its own start. Three quarters of them compile: on 16 half of
them take a third longer, and those that share a core with another compile each kernel slower."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""Of libraries that the process imports and does not compute with: it forks."""


class Job(NamedTuple):
    """What is compiled, as the other process pickles it."""

    kernel: Any
    """The ``triton.jit`` function."""
    signature: Any
    constants: Any
    attrs: Any
    target: Any
    options: dict[str, Any]
    launcher: Any
    """The class of what launches kernels there: it is made, and not the kernel; else None."""
    settings: dict[str, Any]
    """Triton's, by their places in ``triton.knobs``."""


def packed(job: Job) -> bytes:
    """The job as bytes for the socket. Raises what pickle does where something has no name to be
    found by."""
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(tuple(job))
    function = getattr(job.kernel, "fn", job.kernel)
    return f"{function.__module__}\n".encode() + file.getvalue()


def module_of(job: bytes) -> str:
    """In the other process: the kernel's, which may be imported before anything is unpickled."""
    return job.partition(b"\n")[0].decode()


def unpacked(job: bytes) -> Job:
    """The job again, in the other process."""
    return Job(*_Unpickler(io.BytesIO(job.partition(b"\n")[2])).load())


class _Pickler(pickle.Pickler):
    def persistent_id(self, each: Any) -> Any:
        """Kernels are named: there are all kinds of things in them."""
        function = getattr(each, "fn", None)
        if not hasattr(each, "cache_key") or function is None:
            return None
        module, name = function.__module__, function.__qualname__
        if module == "__main__" or _found(sys.modules[module], name) is not each:
            raise pickle.PicklingError(f"{module}.{name} is another one, or in no module")
        return module, name


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: Any) -> Any:
        return _found(importlib.import_module(name[0]), name[1])


def _found(module: Any, name: str) -> Any:
    for each in name.split("."):
        module = getattr(module, each, None)
    return module


class Ended(RepriseError):
    """The process beside is gone, or could not compile it."""


class Beside:
    """The process, and what is asked of it.

    Args:
        most: Kernels that it compiles at a time.

    Raises:
        OSError: It does not start.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.began = time.monotonic()
        self.ready = threading.Event()
        """It has imported what it needs, or is gone."""
        self._lock = threading.Lock()
        self._asked: dict[int, Future[float]] = {}
        self._number = 0
        self._over = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            # In a group of its own: what it has started ends with it, and Ctrl-C is ours.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "reprise.kernel_compiler", str(number), str(most)],
                pass_fds=[number], env={**environment(), **ONE_THREAD}, process_group=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        self._socket = ours
        threading.Thread(target=self._read, name="reprise-kernels-beside", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, job: bytes) -> Future[float]:
        """Have something compiled.

        Args:
            job: See :func:`packed`.

        Returns:
            The seconds that it took, or :class:`Ended`.
        """
        future: Future[float] = Future()
        with self._lock:
            if self._over:
                future.set_exception(Ended("the process that compiles kernels has ended"))
                return future
            self._number += 1
            self._asked[self._number] = future
            number = self._number
        try:
            self._socket.send(number.to_bytes(8, "little") + job)
        except OSError as error:
            with self._lock:
                mine = self._asked.pop(number, None)
            if mine is not None:
                mine.set_exception(Ended(f"the process that compiles kernels is gone: {error}"))
        return future

    def close(self) -> None:
        """End it, with all that it has begun. Another call changes nothing."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            if not self._over:
                with contextlib.suppress(OSError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        while True:
            try:
                said = self._socket.recv(SAID)
            except OSError:
                said = b""
            if not said:
                break
            self._take(json.loads(said))
        with self._lock:
            self._over = True  # its number may be another's from here on
            left, self._asked = list(self._asked.values()), {}
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self.ready.set()
        for each in left:
            if each.set_running_or_notify_cancel():
                each.set_exception(Ended("the process that compiles kernels has ended"))

    def _take(self, said: Mapping[str, Any]) -> None:
        if "ready" in said:
            logger.debug(
                "kernels are compiled beside, %d at a time, since %.2f s after that was begun",
                self.most, time.monotonic() - self.began,
            )  # fmt: skip
            self.ready.set()
            return
        with self._lock:
            future = self._asked.pop(said["job"], None)
        # No thread may wait for it any more.
        if future is None or not future.set_running_or_notify_cancel():
            return
        if said["error"] is None:
            future.set_result(said["seconds"])
        else:
            future.set_exception(Ended(said["error"]))


_beside: Beside | None = None
_users = 0
_lock = threading.Lock()
_asked_for: Path | None = None


def begin(share: int = 1) -> Beside | None:
    """The process, begun unless it has been; None: this machine has no processor to spare, or it
    does not start, which is logged.

    Args:
        share: Processes like this one that do the same on this machine.
    """
    global _beside
    with _lock:
        if _beside is None:
            cpus = usable_cpus()[0]
            if cpus < FEWEST_CPUS:
                return None
            try:
                _beside = Beside(max(1, cpus * 3 // 4 // share))
            except OSError as error:
                logger.warning("kernels are compiled in this process: %s", error)
        return _beside


def begun() -> Beside | None:
    """The process, if it was begun."""
    return _beside


@contextlib.contextmanager
def used() -> Iterator[None]:
    """In the ``with`` block kernels may be asked for. When no thread is in one any more the process
    ends; a later one may begin another."""
    global _users
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
        if not _users:
            end()


def end() -> None:
    """Whatever it has begun, it is not needed any more."""
    global _beside
    with _lock:
        beside, _beside = _beside, None
    if beside is not None:
        beside.close()


def _forget() -> None:
    """Forget the compiler process in a fork of this one: it is the parent's."""
    global _beside, _lock, _users
    _beside, _lock, _users = None, threading.Lock(), 0


os.register_at_fork(after_in_child=_forget)


def remember(options: Mapping[str, Any]) -> None:
    """Which start this is.

    Args:
        options: Of an engine, as users give them.
    """
    global _asked_for
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return  # nothing is compiled, and no note may say that all is
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        _asked_for = _note(options)


def begin_unless_kept(share: int = 1) -> bool:
    """Begin it if no start like the one that is remembered has left a note that all kernels are
    kept; whether it was.

    Args:
        share: See :func:`begin`.
    """
    missing = _asked_for is not None and not _asked_for.exists()
    return missing and begin(share) is not None


def begin_for(options: Mapping[str, Any], share: int) -> None:
    """As a command does before it imports anything (:mod:`reprise.early`), in a program that makes
    an engine itself: still before the first kernel is missed.

    Args:
        options: Of the engine.
        share: See :func:`begin`.
    """
    if _asked_for is None:
        remember(options)
        begin_unless_kept(share)


def all_kept() -> None:
    """Leave that note: each kernel of this start was in the cache, or is now."""
    if _asked_for is not None:
        with contextlib.suppress(OSError):  # then the next start begins a process for nothing
            _asked_for.parent.mkdir(parents=True, exist_ok=True)
            _asked_for.touch()


def _note(options: Mapping[str, Any]) -> Path:
    """Where it is: among the kernels, so that it goes with them. Its name has what decides which
    kernels there are, as far as that is known before anything is imported."""
    wanted = os.environ.get("TRITON_CACHE_DIR")
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~/")
    directory = Path(wanted) if wanted else Path(home) / ".triton" / "cache"
    sources = sorted(_modified(os.path.join(os.path.dirname(__file__), "ops")))
    known = repr((sorted(options.items(), key=str), sys.version, sources))
    return directory / f"reprise-{hashlib.sha256(known.encode()).hexdigest()[:24]}"


def _modified(directory: str) -> Iterator[tuple[str, int]]:
    """The sources in it, and when."""
    with os.scandir(directory) as entries:
        for each in entries:
            if each.name.endswith(".py"):
                yield each.path, each.stat().st_mtime_ns
            elif each.is_dir() and each.name != "__pycache__":
                yield from _modified(each.path)
