"""Processes of engines and servers, forked from one that has imported what they import.

A follower or a replica imports for three seconds before it begins, and an engine of a tiny model
with its answers takes less; the processes of a server import for two. Here ``subprocess.Popen``
has them forked by a *nursery*, which has imported it and has one thread, and no device. What comes
of it is what the caller would have started: its own child, with the arguments, environment,
directory, descriptors and blocked signals that were asked for and none beside, killed, stopped and
waited for as any other. ``ps`` shows its command. Linux alone can do this; elsewhere, and where a
test is marked ``cold``, processes start as users' do.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

ROOT = str(Path(__file__).parents[1] / "src")
_TESTS = Path(__file__).parent
SERVE_WITH = str(_TESTS / "server" / "serve_with.py")
FAULTY_ENGINE = str(_TESTS / "server" / "faulty_engine.py")
INTERRUPTED = str(_TESTS / "engine" / "interrupted_program.py")
ENDS_MEANWHILE = str(_TESTS / "program_that_ends_meanwhile.py")
SUM_CHILD, ROWS_CHILD = (str(_TESTS / "parallel" / f"{each}_child.py") for each in ("sum", "rows"))
PROGRAMS = {
    "reprise": True, "reprise.follower": False, "reprise.replicas.process": True,
    "reprise.server.engine_process": True, "reprise.server.worker": False,
    "reprise.testing.stub_engine": False, "reprise.doctor.collectives": False, SERVE_WITH: True,
    FAULTY_ENGINE: False, INTERRUPTED: False, ENDS_MEANWHILE: False, SUM_CHILD: False,
    ROWS_CHILD: False, "told": True,
}  # fmt: skip
"""Files, and modules as behind ``python -m``; whether they start others of them, and get a nursery
of their own. The last one is for the test of all this."""
IMPORTS = (
    "reprise.parallel.follower", "reprise.engine.process", "reprise.replicas.service",
    "torch._dynamo", "torch._inductor.compile_fx", "safetensors.torch", "tokenizers",
    "transformers.utils.chat_template_utils",
)  # fmt: skip
"""What they import, then, when they start or for a first chat."""
OF_SERVERS = (
    "reprise.cli.app", "reprise.server.supervisor", "reprise.server.worker",
    "reprise.server.engine_server", "reprise.testing.stub_engine", "xgrammar",
)  # fmt: skip
"""The same, of processes that need packages which may not be there."""
INSTALLED = [each for each in sys.path if each != ROOT]
"""In a nursery: what is imported from beside ``PYTHONPATH``."""
IDLE = "nursery"
"""What ``ps`` shows of one."""
_LONGEST_COMMAND = 4096
_ANSWER_SECONDS = 120.0
_DEATH_SIGNAL, _SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None)
_real = subprocess.Popen


def can_be() -> bool:
    """Whether the system hands a process the orphans of its children."""
    return sys.platform == "linux" and hasattr(_LIBC, "prctl")


def end_with_parent() -> None:
    """What a child calls before it runs its program: a killed pytest leaves no child behind, where
    the system can see to that."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_DEATH_SIGNAL, signal.SIGTERM)


def lead_terminal() -> None:
    """The same, of one in a session of its own: it is the terminal's that it reads from."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


WITHOUT = {number: functools.partial(os.close, number) for number in range(3)}
"""The same, of one whose shell has closed a stream, by its number."""
_PREPARATIONS: dict[str, Callable[[], None]] = {
    "ends with its parent": end_with_parent, "leads a terminal": lead_terminal,
    **{f"without {number}": each for number, each in WITHOUT.items()},
}  # fmt: skip
"""What :class:`Popen` may be given to be called so."""
_SET_MEANWHILE = {
    "PYTHONPATH", "TMPDIR", "PYTEST_CURRENT_TEST", "TERM",
    # What commands, the profiler and the compiler set in a process that has used them.
    "TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "TOKENIZERS_PARALLELISM",
    "HF_HUB_DISABLE_PROGRESS_BARS", "KINETO_LOG_LEVEL", "TEARDOWN_CUPTI",
    "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "TRITON_CACHE_DIR",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
}  # fmt: skip
"""Variables that make no module another one."""


class Nursery:
    """The process that forks, seen from where children are asked for.

    Args:
        connection: To it.
        environment: That it has imported with.
    """

    def __init__(self, connection: socket.socket, environment: dict[str, str]) -> None:
        self._environment = _read_by_imports(environment)
        self._connection = connection
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        connection.settimeout(_ANSWER_SECONDS)

    @classmethod
    def started(
        cls, environment: dict[str, str], imports: Sequence[str] = (*IMPORTS, *OF_SERVERS)
    ) -> Nursery:
        """A new one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = _real(
                [
                    sys.executable, "-P", __file__, str(theirs.fileno()), ",".join(imports),
                    "-" * _LONGEST_COMMAND,
                ],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": ROOT},
            )  # fmt: skip
        found = cls(ours, environment)
        found._process = process
        return found

    def serves(self, environment: dict[str, str]) -> bool:
        """Whether it has imported what a process with this environment would import."""
        return self._environment == _read_by_imports(environment)

    def close(self) -> None:
        """Let it end."""
        self._connection.close()
        if self._process is not None:
            self._process.wait()

    def child(self, order: dict[str, Any], descriptors: list[int]) -> int:
        """The id of a new child of this process."""
        with self._lock:
            # It is orphaned at once, and so the next one's above that takes orphans: here.
            _LIBC.prctl(_SUBREAPER, 1, 0, 0, 0)
            try:
                message = json.dumps({**order, "parent": os.getpid()}).encode()
                socket.send_fds(self._connection, [message], descriptors)
                return int(self._connection.recv(64))
            finally:
                _LIBC.prctl(_SUBREAPER, 0, 0, 0, 0)


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """Has the nursery fork :data:`PROGRAMS`."""

    usual: ClassVar[dict[str, str]] = {}
    """Variables of the process that asks."""
    nursery: ClassVar[Nursery | None] = None
    """There when the first child was asked for."""
    cold: ClassVar[bool] = False
    """Leave it."""

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any,
        cwd: Any, env: Any, startupinfo: Any, creationflags: int, shell: bool, *rest: Any,
    ) -> None:  # fmt: skip
        pipes, start_new_session = rest[:6], rest[-2]
        variables = dict(os.environ if env is None else env)
        program = _program(args)
        called = {each: name for name, each in _PREPARATIONS.items()}
        known = preexec_fn is None or preexec_fn in called
        if program is None or self.cold or not known or not self._is_served(variables):
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                creationflags, shell, *rest,
            )  # fmt: skip
            return
        assert not shell
        read, _, _, write, _, error = pipes
        standard = [read, write, error]
        given = [own if each == -1 else each for own, each in enumerate(standard)]
        order = {
            "command": [str(each) for each in args],
            "program": program,
            "with_children": PROGRAMS[program],
            "environment": variables,
            "directory": os.getcwd() if cwd is None else os.fspath(cwd),
            "descriptors": [0, 1, 2, *pass_fds],
            "new_session": bool(start_new_session),
            "prepared": called.get(preexec_fn),
            "blocked": [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        }
        assert self.nursery is not None
        try:
            self.pid = self.nursery.child(order, [*given, *pass_fds])
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _is_served(self, environment: dict[str, str]) -> bool:
        if Popen.nursery is None:
            Popen.nursery = Nursery.started(Popen.usual)
        return Popen.nursery.serves(environment)


def _read_by_imports(environment: dict[str, str]) -> dict[str, str]:
    """Of variables those that may make imported modules others."""
    return {name: value for name, value in environment.items() if name not in _SET_MEANWHILE}


def _program(command: Any) -> str | None:
    """Which of :data:`PROGRAMS` it is."""
    if not isinstance(command, (list, tuple)) or command[0] != sys.executable:
        return None
    rest = command[2:] if command[1:2] == ["-P"] else command[1:]
    name = rest[1] if rest[:1] == ["-m"] else rest[0]
    return name if name in PROGRAMS else None


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Within the ``with`` block children are forked so, where they can be."""
    if not can_be() or subprocess.Popen is Popen:
        yield
        return
    Popen.usual = dict(os.environ)
    subprocess.Popen = Popen  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = _real  # type: ignore[misc]
        if Popen.nursery is not None:
            Popen.nursery.close()
            Popen.nursery = None


# ---- in the nursery --------------------------------------------------------------------------


_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Python's own."""


def _await_order(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """In a child: what to become. In the nursery: None, when nobody will ask any more."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 250)
        if not message:
            return None
        between = os.fork()
        if between:
            for each in descriptors:
                os.close(each)
            os.waitpid(between, 0)
            continue
        if os.fork():
            os._exit(0)
        order = json.loads(message)
        while os.getppid() != order["parent"]:
            time.sleep(0.0005)
        return order, descriptors


def _become(order: dict[str, Any], descriptors: list[int], connection: socket.socket) -> None:
    """Run an order's program."""
    # Who asked may send one as soon as it knows to whom: without handlers it would be ignored.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLERS)
    connection.send(str(os.getpid()).encode())
    connection.detach()
    _place(dict(zip(order["descriptors"], descriptors, strict=True)))
    paths = order["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, paths), *INSTALLED]
    tempfile.tempdir = None
    importlib.invalidate_caches()
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["directory"])
    command, program = order["command"], order["program"]
    if order["new_session"]:
        os.setsid()
    if order["with_children"]:
        _have_nursery()  # in the same session: its children are then
    _show(command)
    if order["prepared"] is not None:
        _PREPARATIONS[order["prepared"]]()
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)
    is_file = os.path.isabs(program)
    if "-P" not in command[:2]:
        sys.path.insert(0, os.path.dirname(program) if is_file else order["directory"])
    sys.argv = command[command.index(program) :]
    _open_streams()
    signal.pthread_sigmask(signal.SIG_SETMASK, order["blocked"])
    if is_file:
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _open_streams() -> None:
    """Have streams for what the descriptors are now, as Python opens them: whether there is a place
    to seek, or a reader of lines, is asked once."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        before = getattr(sys, name)
        if not _is_open(number):
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
            continue
        mode, at_once = before.mode, before.write_through
        size = 0 if at_once and number else -1
        buffer: Any = open(number, f"{mode}b", size, closefd=False)  # noqa: SIM115
        getattr(buffer, "raw", buffer).name = before.name
        lines = not at_once and (number == 2 or buffer.isatty())
        stream = io.TextIOWrapper(buffer, before.encoding, before.errors, "\n", lines, at_once)
        stream.mode = mode  # type: ignore[misc]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _have_nursery() -> None:
    """A fork of this process, as new as it is, in which it will have its children forked."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        connection = theirs.detach()
        null = os.open(os.devnull, os.O_RDWR)
        _place({0: null, 1: null, 2: null, connection: connection})
        _serve(socket.socket(fileno=connection))
        sys.exit()
    theirs.close()
    Popen.nursery = Nursery(ours, dict(os.environ))
    subprocess.Popen = Popen  # type: ignore[misc]


def _place(wanted: dict[int, int]) -> None:
    """Have these descriptors, by the numbers they are to have, and no other one."""
    beyond = max([*wanted, *wanted.values()]) + 1
    held = {number: fcntl.fcntl(each, fcntl.F_DUPFD, beyond) for number, each in wanted.items()}
    lowest = 0
    for number in sorted(wanted):
        if lowest < number:  # closerange(0, 0) closes all
            os.closerange(lowest, number)
        os.dup2(held[number], number)
        lowest = number + 1
    os.closerange(lowest, os.sysconf("SC_OPEN_MAX"))


def _show(command: list[str]) -> None:
    """Have ``ps`` show this."""
    with open("/proc/self/stat") as file:
        begin, end = map(int, file.read().rpartition(")")[2].split()[45:47])
    text = b"\0".join(each.encode() for each in command)[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _serve(connection: socket.socket) -> None:
    """Fork what is asked for; in a child: run it."""
    _show([IDLE])
    for each in _HANDLERS:  # what all processes of a group get is for those who ask
        signal.signal(each, signal.SIG_IGN)
    found = _await_order(connection)
    if found is None:
        os._exit(0)  # to take all modules apart would take a second
    _become(*found, connection)


if __name__ == "__main__":
    for each in filter(None, sys.argv[2].split(",")):
        with contextlib.suppress(*([ImportError] if each in OF_SERVERS else [])):
            importlib.import_module(each)
    gc.collect()
    gc.freeze()  # each child would look through all of it
    _serve(socket.socket(fileno=int(sys.argv[1])))
