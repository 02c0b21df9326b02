"""Kernels in C++ for a CPU, compiled where they run, by the compiler that is there.

A source in the folder of its op has a function that takes a struct of addresses and sizes. It is
compiled for the processor when an engine considers the implementation, once for each source,
compiler and processor: the library is kept in the user's cache directory, behind its code a sum of
it, since the system ends a process that loads what a full disk has left of a library. Where there
is no compiler, or it fails, the op has other implementations, and the log says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from reprise.errors import OpError, describe
from reprise.ops import put_off
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno",
    "-Wno-psabi",
)  # fmt: skip
KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes of numbers that kernels take, as they are told them."""
_HERE = Path(__file__).parent
_HEADER = _HERE / "numbers.h"

COMPILE_SECONDS = 120.0
"""Until a compiler is given up: on a machine that is busy each source takes some seconds."""

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


def needs_compiler(platform: Platform) -> str | None:
    """The requirement of implementations in C++."""
    return "computes on the CPU" if platform.device.type != "cpu" else _missing()


@functools.cache
def _missing() -> str | None:
    """Why nothing can be compiled and kept here; said once, for it is the same for every op."""
    try:
        _compiler()
        _cache_directory()
    except (OpError, OSError, RuntimeError) as error:
        logger.warning("kernels in C++ are left out: %s", describe(error))
        return describe(error)
    return None


class Kernel:
    """The function of a source, by the file's name: it takes the address of a struct and returns 0,
    or what is wrong. Within :func:`reprise.ops.put_off.together` it waits for the others.

    Args:
        source: Path below ``reprise/ops``.
        fields: Of the struct: name and type in C.
        wrong: What each number that it returns means.

    Raises:
        OpError: It cannot be compiled here.
    """

    def __init__(
        self, source: str, fields: Sequence[tuple[str, Any]], wrong: Mapping[int, str] | None = None
    ) -> None:
        path = _HERE / source
        _compile_all()
        self.name = path.parent.name
        self.wrong = wrong or {}
        self._arguments = type("Arguments", (ctypes.Structure,), {"_fields_": list(fields)})
        self._function = _function(path, (POINTER,))
        _run_launches()  # what cannot be compiled is not noticed in the midst of a step
        self.address = ctypes.cast(self._function, POINTER).value

    def __call__(self, tensors: Any, *values: Any) -> None:
        """Compute, or put it off.

        Args:
            tensors: What must live until then: all of which it is told the address; None: left out.
            values: Of the struct.

        Raises:
            IndexError: What it found wrong in the tensors; later, if it is put off.
            OpError: One is not in the host's memory.
        """
        for each in tensors:
            if each is not None and not each.is_cpu:
                raise OpError(f"{self.name}: a tensor is on {each.device}, and others on the CPU")
        arguments = self._arguments(*values)
        if not put_off.here.open:
            code = self._function(ctypes.addressof(arguments))
            if code:
                self.refuse(code)
            return
        waiting = put_off.here.waiting
        if waiting is None:
            waiting = put_off.here.waiting = _Launches()
        assert isinstance(waiting, _Launches), "there is one kind of such work on a CPU"
        waiting.add(self, arguments, tensors)

    def refuse(self, code: int) -> NoReturn:
        raise IndexError(f"{self.name}: {self.wrong[code]}")


class _Launches:
    """Calls of kernels, in order."""

    def __init__(self) -> None:
        self._kernels: list[Kernel] = []
        self._addresses: list[int | None] = []
        self._memory: list[Any] = []

    def add(self, kernel: Kernel, arguments: ctypes.Structure, tensors: Any) -> None:
        self._kernels.append(kernel)
        self._addresses += kernel.address, ctypes.addressof(arguments)
        self._memory += arguments, tensors

    def run(self) -> None:
        done = LONG()
        addresses = (POINTER * len(self._addresses))(*self._addresses)
        code = _run_launches()(addresses, len(self._kernels), ctypes.byref(done))
        if code:
            self._kernels[done.value].refuse(code)


@functools.cache
def _run_launches() -> Any:
    return _function(_HERE / "launches.cpp", (POINTER, LONG, POINTER))


def _function(path: Path, arguments: Sequence[Any]) -> Any:
    found = getattr(ctypes.CDLL(str(_compiled(path))), path.stem)
    found.argtypes, found.restype = list(arguments), INT
    return found


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor that may be left out begins."""
    return None if tensor is None else tensor.data_ptr()


def lies_as(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> bool:
    """Whether it is what a kernel, which sees an address alone, takes it for: numbers of the dtype
    without gaps, or left out."""
    return tensor is None or (
        tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous()
    )


@functools.cache
def _compile_all() -> None:
    """Compile all sources, side by side: each takes about a second."""

    def compile(source: Path) -> None:
        with contextlib.suppress(OpError, OSError):  # its own op says what is wrong with it
            _compiled(source)

    sources = [*_HERE.glob("*.cpp"), *_HERE.glob("*/*.cpp")]
    with ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(compile, sources))


def _compiled(source: Path) -> Path:
    compiler, described = _compiler()
    command = [*compiler, *FLAGS, f"-I{_HERE}"]
    parts = (source.read_bytes(), _HEADER.read_bytes(), repr(command[:-1]).encode(), described)
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    library = _cache_directory() / f"{source.parent.name}-{source.stem}-{digest}.so"
    if _is_whole(library):
        return library
    began = time.perf_counter()
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        _run([*command, str(source), "-o", unfinished])
        code = Path(unfinished).read_bytes()
        # Behind the code, where who loads it does not look.
        Path(unfinished).write_bytes(code + hashlib.sha256(code).digest())
        os.replace(unfinished, library)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    logger.info("compiled %s in %.1f s: %s", source.name, time.perf_counter() - began, library)
    return library


def _is_whole(library: Path) -> bool:
    """Whether it is there, as it was compiled."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    whole = hashlib.sha256(content[:-size]).digest() == content[-size:]
    if not whole:
        logger.warning("%s is spoiled: it is compiled again", library)
    return whole


@functools.cache
def _compiler() -> tuple[tuple[str, ...], bytes]:
    """Its name and arguments, and what it says of itself and of the processor."""
    wanted = os.environ.get("CXX") or "g++"
    try:
        choices = [shlex.split(wanted), ["clang++"]]
    except ValueError as error:
        raise OpError(f"CXX={wanted!r} is no command: {error}") from error
    command = next((tuple(each) for each in choices if each and shutil.which(each[0])), None)
    if command is None:
        raise OpError(f"no C++ compiler ({wanted}) on this machine; set CXX")
    return command, _run([*command, *FLAGS, "-E", "-v", "-x", "c++", os.devnull])


def _cache_directory() -> Path:
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


def _run(command: Sequence[str]) -> bytes:
    """What the compiler says of itself, on standard error."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False,
            timeout=COMPILE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OpError(f"{' '.join(command)} takes more than {COMPILE_SECONDS:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OpError(f"{' '.join(command)} fails: {said[-1] if said else done.returncode}")
    return done.stderr
