"""What the start of an engine needs and torch does not, begun before torch is imported."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import mmap
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from reprise import compiling, kernels_beside, platforms

WHOLE = 16 << 20
"""Bytes from which a file is read in one piece."""
_fingerprinting = threading.Lock()


def begin(options: Mapping[str, Any]) -> None:
    """Begin it, beside whatever comes next, in a process that will have an engine and make no fork
    before.

    Args:
        options: Of the engine, as users give them.
    """
    device = options.get("device", "auto")
    compiling.begin(device, options.get("dtype", "auto"))
    # Looked for now: hundreds of files, between which a thread would wait for its turn.
    kernels_beside.remember(options)

    def beside() -> None:
        missing = kernels_beside.begin_unless_kept()
        prepare_compiler()
        if missing:
            build_drivers()

    platforms.wake(device, beside)


def prepare_compiler() -> None:
    """Have Triton find out what each process finds out once, of itself and of the system: it starts
    other programs to ask for the processor's architecture and for the driver's library."""
    fingerprint_compiler()
    # Where it is not called so, or nothing answers, the first kernel pays.
    backends = [name for name in sys.modules if name.startswith("triton.backends.")]
    asked = [
        ("triton.runtime.build", "platform_key"),
        *((name, "library_dirs") for name in backends),
    ]
    for module, name in asked:
        ask = getattr(sys.modules.get(module), name, None)
        if ask is not None:
            with contextlib.suppress(Exception):
                ask()


def build_drivers() -> None:
    """Have Triton build what it speaks with a driver through, which a C compiler does: in each of
    its backends a class, of which there is one object. Those without a device here fail."""
    for name in [name for name in sys.modules if name.startswith("triton.backends.")]:
        module = sys.modules[name]
        for each in [each for each in vars(module) if each.endswith("Utils")]:
            with contextlib.suppress(Exception):
                getattr(module, each)()


def fingerprint_compiler() -> None:
    """Have Triton read all of itself, which its kernel cache asks for: 400 MB.

    Threads that come at once wait for the first. Triton asks for a megabyte at a time, and between
    two of them a thread waits for its turn with the interpreter, which an import beside keeps for
    milliseconds: so the largest file is there in one piece.
    """
    # Where it is missing or does not import, its kernels are left out by name.
    with contextlib.suppress(Exception), _fingerprinting:
        cache = importlib.import_module("triton.runtime.cache")
        fingerprint = getattr(cache, "triton_key", None)
        if fingerprint is None:  # where it is not called so, the first kernel pays
            return
        with contextlib.ExitStack() as stack:
            if not hasattr(cache, "open"):
                vars(cache)["open"] = _opened
                stack.callback(vars(cache).pop, "open")
            fingerprint()


def _opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    """As Python's own ``open``, but that large files are read in one piece."""
    file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115 - the caller closes it
    if mode == "rb" and os.fstat(file.fileno()).st_size >= WHOLE:
        return _Whole(file)
    return file


class _Whole:
    """A file whose first piece is all of it, however little is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, size: int = -1) -> Any:
        found, self._left = self._left, b""
        return found

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
