"""Kernels in C++ for a CPU, compiled where they run, by the compiler that is there.

A source in the folder of its op has a function that takes addresses and sizes. It is compiled for
the processor when an engine considers the implementation, once for each source, compiler and
processor: the library is kept in the user's cache directory. Where there is no compiler, or it
fails, the op has other implementations, and the log says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reprise.errors import OpError
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

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


def needs_compiler(platform: Platform) -> str | None:
    """The requirement of implementations in C++."""
    if platform.device.type != "cpu":
        return "computes on the CPU"
    return platform.compiler_missing()


def function(source: str, arguments: Sequence[Any], result: Any = None) -> Any:
    """The function of a source, by the file's name.

    Args:
        source: Path below ``reprise/ops``.
        arguments: Their types in C.
        result: Its type; None: it returns nothing.

    Raises:
        OpError: It cannot be compiled here.
    """
    path = _HERE / source
    found = getattr(ctypes.CDLL(str(_compiled(path))), path.stem)
    found.argtypes, found.restype = list(arguments), result
    return found


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor that may be left out begins."""
    return None if tensor is None else tensor.data_ptr()


def _compiled(source: Path) -> Path:
    compiler, described = _compiler()
    command = [compiler, *FLAGS, f"-I{_HERE}"]
    parts = (source.read_bytes(), _HEADER.read_bytes(), repr(command[:-1]).encode(), described)
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    library = _cache_directory() / f"{source.parent.name}-{source.stem}-{digest}.so"
    if library.exists():
        return library
    began = time.perf_counter()
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        _run([*command, str(source), "-o", unfinished])
        os.replace(unfinished, library)
    except BaseException:
        os.unlink(unfinished)
        raise
    logger.info("compiled %s in %.1f s: %s", source.name, time.perf_counter() - began, library)
    return library


@functools.cache
def _compiler() -> tuple[str, bytes]:
    """Its name, and what it says of itself and of the processor."""
    choices = (os.environ.get("CXX", "g++"), "clang++")
    name = next((each for each in choices if shutil.which(each)), None)
    if name is None:
        raise OpError(f"no C++ compiler ({choices[0]}) on this machine; set CXX")
    return name, _run([name, *FLAGS, "-E", "-v", "-x", "c++", os.devnull])


def _cache_directory() -> Path:
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "reprise", "cpp")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _run(command: Sequence[str]) -> bytes:
    """What the compiler says of itself, on standard error."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OpError(f"{' '.join(command)} fails: {said[-1] if said else done.returncode}")
    return done.stderr
