"""Compile the extension, once for each version of torch: ``python -m reprise_sim.build``."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import IO

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
NAME = "reprise_sim_core"
FLAGS = ["-O1", "-g0", "-Wall"]
WAIT = 600.0
"""Seconds to wait for another process that compiles the same."""


def _directory() -> Path:
    """Where this torch's extension goes, beside the sources."""
    import torch

    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    content = hashlib.sha256(b"".join(each.read_bytes() for each in sources)).hexdigest()[:12]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return HERE.parent / "build" / f"{torch.__version__}-{python}-{content}"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _built() -> Path:
    return _directory() / f"{NAME}.so"


def missing() -> str | None:
    """Why there is no extension and none can be made; None: there is, or it can be."""
    if not SOURCES.is_dir():
        return "the sources of device sim are not installed; use an editable install"
    if _built().exists():
        return None
    if _compiler() is None:
        return "device sim has to be compiled, and there is no C++ compiler (c++, g++ or $CXX)"
    if _ninja() is None:
        return "device sim has to be compiled, and ninja is not installed (pip install ninja)"
    return None


def _ninja() -> str | None:
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja")


def compile_extension() -> Path:
    """The extension's file, compiled if it is not there.

    Raises:
        RuntimeError: It cannot be compiled; the message is the compiler's.
    """
    target = _built()
    if target.exists():
        return target
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    directory = target.parent
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "mine").open("w") as file:
        _wait_for(file)
        if not target.exists():
            _compile(directory)
    return target


def _compile(directory: Path) -> None:
    from torch.utils import cpp_extension

    ninja = _ninja()
    assert ninja is not None
    os.environ["PATH"] = os.pathsep.join([str(Path(ninja).parent), os.environ.get("PATH", "")])
    # torch's own lock outlives a compilation that was killed, and would be waited for without end.
    (directory / "lock").unlink(missing_ok=True)
    print("Compiling the simulated accelerator (a minute or two, once) ...", flush=True)
    cpp_extension.load(
        NAME,
        [str(each) for each in sorted(SOURCES.glob("*.cpp"))],
        extra_cflags=FLAGS,
        extra_ldflags=cpp_library(),
        build_directory=str(directory),
        is_python_module=False,
    )


def cpp_library() -> list[str]:
    """The C++ library that torch has loaded, if the system tells. It is linked first: a compiler
    that puts one of its own into what it makes would make one whose streams fail beside torch's."""
    try:
        mapped = Path("/proc/self/maps").read_text().split()
    except OSError:
        return []
    return sorted({each for each in mapped if Path(each).name.startswith("libstdc++.so")})


def _wait_for(file: IO[str]) -> None:
    """Take the lock, which a process that ends gives back however it ended."""
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - began > WAIT:
                raise RuntimeError(
                    f"another process has been compiling device sim for {WAIT:.0f} s"
                ) from None
            time.sleep(0.2)


def load() -> ModuleType:
    """The extension as a module; see :func:`compile_extension`."""
    import torch  # noqa: F401 - the extension needs its libraries

    found = importlib.util.spec_from_file_location(NAME, compile_extension())
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def main() -> None:
    reason = missing()
    if reason is not None:
        print(f"{reason}: tests of device sim will be skipped.")
        return
    began = time.monotonic()
    path = compile_extension()
    print(f"Device sim: {path.parent.name}, {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
