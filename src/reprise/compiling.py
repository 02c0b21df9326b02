"""Libraries of kernels in C++, compiled where they run, by the compiler that is there.

A source in the folder of its op is compiled once for each type of numbers that it computes with,
each compiler and processor: the library is kept in the user's cache directory, behind its code a
sum of it, since the system ends a process that loads what a full disk has left of a library.
A process that compiles a source holds a lock on it; others that need it wait.

A first start needs them after it has imported torch, which takes as long as to compile them. So
this module does not import torch, and code that knows that an engine will be made calls
:func:`begin` first: a process beside (``python -m reprise.compiling``) compiles what is not kept. A
thread would not get on, for an import holds the interpreter while it loads libraries.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reprise.cpu_limits import usable_cpus
from reprise.errors import OpError
from reprise.processes.child import environment

logger = logging.getLogger(__name__)

DEVICE = "cpu"
"""What such kernels compute on."""
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno",
    "-Wno-psabi",
)  # fmt: skip
NUMBERS = {"float32": "float", "bfloat16": "bf16"}
"""What such kernels compute with: names of dtypes, and what they are called in C++."""
HOME = Path(__file__).parent / "ops"
"""Where sources are, and what they include."""
ASK_SECONDS = 20.0
"""Until a compiler is given up that is asked what it is, by each process: it takes 0.05 s."""
COMPILE_SECONDS = 120.0
"""Until a compiler is given up: on a machine that is busy each source takes some seconds."""
LOOK_SECONDS = 0.005
"""Between two looks at whether others are done."""
_HEADER = HOME / "numbers.h"
_WRONG = (OpError, OSError, RuntimeError)
"""What keeps libraries from being made: RuntimeError where a user has no home."""


_begun = False
_ending = False
"""Of the process beside: nothing more is compiled."""
_hangs: OpError | None = None
"""What is said of the compiler once it did not end."""


def begin(device: str = DEVICE, dtype: str = "auto") -> subprocess.Popen[bytes] | None:
    """Have compiled what is not kept, beside whatever comes next, by a process that ends when this
    one does, however it does. A second call does nothing; what goes wrong is raised where a library
    is asked for.

    Args:
        device: On which an engine will compute, as users name it; for others nothing is done.
        dtype: In which it will, likewise; what is not foreseen is compiled when it is needed.

    Returns:
        The process, if there is anything to do.
    """
    global _begun
    number = NUMBERS.get("float32" if dtype in ("auto", "float") else dtype)
    if _begun or device.partition(":")[0] not in ("auto", DEVICE) or number is None:
        return None
    _begun = True
    try:
        if all(is_whole(_at(*each)) for each in sources(number)):
            return None
        # In a group of its own: what it has started ends with it. The pipe ends with this process.
        beside = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, number], env=environment(), process_group=0,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except _WRONG:
        return None
    # Else it would stay in the system's table as long as a server runs.
    threading.Thread(target=_wait, args=(beside,), name="reprise-compiling", daemon=True).start()
    return beside


def _wait(beside: subprocess.Popen[bytes]) -> None:
    beside.wait()
    assert beside.stdin is not None
    beside.stdin.close()


def main() -> None:
    """The process beside: leaves a processor to the one that it works for."""
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with ThreadPoolExecutor(max(1, usable_cpus()[0] - 1)) as pool:
        list(pool.map(_compile_unless_ending, sources(sys.argv[1])))


def _end(*_: object) -> None:
    global _ending
    _ending = True


def _compile_unless_ending(which: tuple[Path, str]) -> None:
    if not _ending:
        _compile_unless_begun(which)


def _end_with_parent() -> None:
    os.read(0, 1)
    _end()
    while True:  # a compiler that was just being started, too
        os.killpg(0, signal.SIGTERM)
        time.sleep(LOOK_SECONDS)


def sources(number: str) -> list[tuple[Path, str]]:
    """All that is needed to compute with such numbers: sources, and for what."""
    whatever = [(each, "") for each in sorted(HOME.glob("*.cpp"))]
    return whatever + [(each, number) for each in sorted(HOME.glob("*/*.cpp"))]


def library(source: Path, number: str) -> Path:
    """The library of a source; meanwhile all others of such numbers are compiled too.

    Args:
        source: In :data:`HOME`.
        number: What it computes with, as C++ calls it; empty where that is nothing to it.

    Raises:
        OpError: It cannot be compiled here.
        OSError: It cannot be kept here; RuntimeError: where is not known.
    """
    if number:
        _compile_others(number)
    return compiled(source, number)


@functools.cache
def _compile_others(number: str) -> None:
    # From the other end than the process beside, if there is one.
    with ThreadPoolExecutor(usable_cpus()[0]) as pool:
        list(pool.map(_compile_unless_begun, reversed(sources(number))))


def _compile_unless_begun(which: tuple[Path, str]) -> None:
    with contextlib.suppress(*_WRONG):  # raised where the library is needed
        compiled(*which, wait=False)


def compiled(source: Path, number: str, wait: bool = True) -> Path:
    """The library of a source, if need be after it was compiled.

    Args:
        source: In C++.
        number: As of :func:`library`.
        wait: For others that compile it.

    Raises:
        BlockingIOError: Others compile it, and are not waited for.
        OpError: As of :func:`library`, and others likewise.
    """
    library = _at(source, number)
    if not is_whole(library):
        with _locked(library.parent / f"{_name(source, number)}.lock", wait) as (file, waited):
            if is_whole(library):
                return library
            told = _told(file, library) if waited else None
            if told is not None:  # as they would be told that compile it again
                raise OpError(told)
            try:
                _compile(source, number, library)
            except OpError as error:
                os.pwrite(file, f"{library}\n{error}".encode(), 0)
                raise
    return library


def _told(file: int, library: Path) -> str | None:
    """Why those that were waited for could not compile it, if they say so."""
    which, _, why = os.pread(file, 1 << 16, 0).decode(errors="replace").partition("\n")
    return why if which == str(library) else None


def _at(source: Path, number: str) -> Path:
    """Where its library is kept."""
    command, described = compiler()
    command = (*command, *FLAGS, number)
    parts = (source.read_bytes(), _HEADER.read_bytes(), repr(command).encode(), described)
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    return cache_directory() / f"{_name(source, number)}-{digest}.so"


def _name(source: Path, number: str) -> str:
    return "-".join(each for each in (source.parent.name, source.stem, number) if each)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[tuple[int, bool]]:
    """The file's descriptor, and whether another one had the lock before."""
    with path.open("w+b") as file:
        waited = False
        until = time.monotonic() + (COMPILE_SECONDS if wait else 0.0)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    raise
                waited = True
                if time.monotonic() > until:
                    break  # a process that is stopped: both may compile it
                time.sleep(LOOK_SECONDS)
            except OSError:
                break  # a file system without locks, as some clusters' homes: likewise
        yield file.fileno(), waited


def _compile(source: Path, number: str, library: Path) -> None:
    command, _ = compiler()
    numbers = (f"-DNUMBER={number}",) if number else ()
    began = time.perf_counter()
    with _unfinished(library.parent, _name(source, number)) as folder:
        made = folder / library.name
        arguments = (*FLAGS, *numbers, f"-I{HOME}", str(source), "-o", str(made))
        _run((*command, *arguments), COMPILE_SECONDS)
        code = made.read_bytes()
        # Behind the code, where the loader does not look.
        made.write_bytes(code + hashlib.sha256(code).digest())
        os.replace(made, library)
    took = time.perf_counter() - began
    logger.info("compiled %s in %.1f s: %s", _name(source, number), took, library)


@contextlib.contextmanager
def _unfinished(directory: Path, name: str) -> Iterator[Path]:
    """A folder for what a compiler writes. Its process holds a lock on it, so those of processes
    that were killed are known, and removed."""
    for each in directory.glob(f"unfinished-{name}-*"):
        with contextlib.suppress(OSError), _held(each):
            shutil.rmtree(each)
    folder = Path(tempfile.mkdtemp(prefix=f"unfinished-{name}-", dir=directory))
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # without locks it is removed by this process alone
                stack.enter_context(_held(folder))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_whole(library: Path) -> bool:
    """Whether the library is there, as it was compiled."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    whole = hashlib.sha256(content[:-size]).digest() == content[-size:]
    if not whole:
        logger.warning("%s is spoiled: it is compiled again", library)
    return whole


def compiler() -> tuple[tuple[str, ...], bytes]:
    """The compiler's name and arguments, and what it says of itself and of the processor.

    Raises:
        OpError: There is none, or it does not say.
    """
    found = _hangs or _asked()
    if isinstance(found, OpError):
        raise found.with_traceback(None)
    return found


@functools.cache
def _asked() -> tuple[tuple[str, ...], bytes] | OpError:
    """One that takes its time to fail is not asked again."""
    try:
        return _ask()
    except OpError as error:
        return error


def _ask() -> tuple[tuple[str, ...], bytes]:
    wanted = os.environ.get("CXX") or "g++"
    try:
        choices = [shlex.split(wanted), ["clang++"]]
    except ValueError as error:
        raise OpError(f"CXX={wanted!r} is no command: {error}") from error
    command = next((tuple(each) for each in choices if each and shutil.which(each[0])), None)
    if command is None:
        raise OpError(f"no C++ compiler ({wanted}) on this machine; set CXX")
    asked = (*command, *FLAGS, "-E", "-v", "-x", "c++", os.devnull)
    return command, _run(asked, ASK_SECONDS)


def cache_directory() -> Path:
    """Where libraries are kept.

    Raises:
        OpError: Others may write there.
        OSError: It cannot be made; RuntimeError: the user has no home.
    """
    wanted = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one means nothing, says its specification: here it would be whose directory it is.
    base = Path(wanted) if os.path.isabs(wanted) else Path.home() / ".cache"
    directory = base / "reprise" / "cpp"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = directory.stat()
    if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OpError(
            f"{directory} may be written by others than this user, who would choose the code that "
            "runs here: set XDG_CACHE_HOME to a directory of this user's alone"
        )
    return directory


def _run(command: Sequence[str], seconds: float) -> bytes:
    """What the compiler says of itself, on standard error. One that does not end is not called
    again by this process."""
    global _hangs
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False,
            timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        _hangs = OpError(f"{' '.join(command)} takes more than {seconds:.0f} s")
        raise _hangs from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OpError(f"{' '.join(command)} fails: {said[-1] if said else done.returncode}")
    return done.stderr


if __name__ == "__main__":
    main()
