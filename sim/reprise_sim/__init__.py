"""A simulated accelerator: a device of PyTorch's own that is asynchronous and not CUDA.

Importing this package loads nothing: :func:`load` registers the device ``sim`` with torch, once a
process and for good. See ``README.md`` beside this package.
"""

from __future__ import annotations

import atexit
import threading
from typing import Any

from reprise_sim import build

__all__ = ["load", "missing"]

_lock = threading.Lock()
_core: Any = None


def missing() -> str | None:
    """Why the device cannot be used here; None: it can."""
    return None if _core is not None else build.missing()


def load() -> Any:
    """Register the device, building its extension if that has not been done; returns it.

    Raises:
        RuntimeError: It cannot be built, or another package has taken torch's one slot for
            devices of others (``PrivateUse1``).
    """
    global _core
    with _lock:
        if _core is None:
            _core = _register()
    return _core


def _register() -> Any:
    import torch

    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", "sim"):
        raise RuntimeError(f"device sim: torch has the device {taken!r} in its one slot for others")
    core = build.load()
    torch.utils.rename_privateuse1_backend("sim")
    from reprise_sim import device

    device.core = core
    torch._register_device_module("sim", device)
    torch.utils.generate_methods_for_privateuse1_backend()
    if torch.distributed.is_available():
        from reprise_sim import collectives

        collectives.register()
    atexit.register(_finish, core)
    return core


def _finish(core: Any) -> None:
    # A worker must not call into an interpreter that is no more.
    try:
        core.configure()  # waits for all that was submitted
    finally:
        core.stop()
