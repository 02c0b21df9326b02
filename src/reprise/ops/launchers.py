"""Triton's launchers, loaded so that threads may compile side by side.

Triton builds a module in C for each signature of a kernel, all of one name. Python makes a second
load of the same file an update of whatever module has that name, so two threads that load launchers
at the same time can end up with one module: a kernel is then launched by the launcher of another,
with the wrong number of arguments or, unnoticed, with wrong types.
"""

from __future__ import annotations

import functools
import sys
import threading
from types import ModuleType

from triton.runtime import build

_lock = threading.Lock()


def load_apart() -> None:
    """From now on each load gives a module of its own. Another call changes nothing."""
    load = getattr(build, "_load_module_from_path", None)
    if load is None or hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def loaded(name: str, path: str) -> ModuleType:
        with _lock:
            sys.modules.pop(name, None)
            module: ModuleType = load(name, path)
            return module

    build._load_module_from_path = loaded
