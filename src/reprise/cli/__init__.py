"""The command line. One file a command; nothing here imports torch before a command runs."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import threading
from types import FrameType

UNFLUSHED = 120
"""The interpreter's own status where a stream does not take what was written."""
YOUNG_OBJECTS = 100_000
"""New objects that are looked through for garbage at once. Importing makes a million, nearly all
of which stay: with Python's own number, a tenth of the start would be spent looking at them."""


def main() -> None:
    """Run ``reprise`` with the arguments of this process, which then ends."""
    from reprise.cli.failures import reported

    gc.set_threshold(YOUNG_OBJECTS)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    try:
        # Commands report their own failures; this is for what happens before and after one.
        with reported(debug=False):
            _mend_streams()
            from reprise.cli.app import app

            app(prog_name="reprise")
    except SystemExit as end:
        if isinstance(end.code, int | None):
            _leave(end.code or 0)
        raise


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C ends the process at once while torch is imported: its C++ would swallow what is raised
    there, go on with half of numpy, and break somewhere else."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        from reprise.cli.failures import EXIT_INTERRUPTED

        os.write(2, b"\ninterrupted\n")
        os._exit(EXIT_INTERRUPTED)
    signal.default_int_handler(number, frame)


def leave_interrupts_to_python() -> None:
    """No torch is imported from now on. asyncio has Ctrl-C cancel its task, which may then say what
    it has, only where the handler is Python's own."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(status: int) -> None:
    """End the process as the interpreter does, but for freeing all objects, which takes half a
    second: join the threads, run the exit handlers, flush the streams."""
    join_threads = getattr(threading, "_shutdown", None)
    run_handlers = getattr(atexit, "_run_exitfuncs", None)
    if join_threads is None or run_handlers is None:
        return  # the interpreter does it
    join_threads()
    run_handlers()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or UNFLUSHED
    os._exit(status)


class Messages(io.TextIOWrapper):
    """Standard error: what it does not take, as on a disk that is full, is lost, and the program
    goes on, since none is run for its messages."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _mend_streams() -> None:
    """Give what a shell has closed an empty stand-in, and let neither a character nor a message
    that is not taken stop the program."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
            # It has the number that was free. Children need it taken too: theirs would be the first
            # connection that they get, in whose midst a library's messages would be written.
            os.set_inheritable(number, True)
    old = sys.stderr
    if old is sys.__stderr__ and isinstance(old, io.TextIOWrapper):  # which keeps the buffer open
        sys.stderr = Messages(
            old.buffer, encoding=old.encoding, errors=old.errors, line_buffering=True
        )
    if isinstance(sys.stdin, io.TextIOWrapper):
        # The engine refuses such a text with a message; decoding would end the program.
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
