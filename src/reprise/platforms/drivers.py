"""What devices' drivers do at their first use, begun before torch is imported.

A driver takes half a second to find its devices and to make a context on one, torch takes longer to
import, and neither needs the other. So nothing here imports it. Whatever fails is left to torch,
which says what is wrong when it comes to the same place.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable


def wake(device: str = "auto", beside: Callable[[], None] = lambda: None) -> None:
    """Begin, in threads beside whatever comes next. For processes that will have an engine and
    make no fork before: a driver does not survive one.

    Args:
        device: On which the engine will compute, as users name it.
        beside: Called in a thread of its own if there is such a driver.
    """
    name, _, index = device.partition(":")

    def work(find: Callable[[int], Callable[[], object] | None]) -> None:
        start = find(int(index or 0))
        if start is not None:
            _begin("reprise-beside-driver", beside)
            start()

    for each, find in _DRIVERS.items():
        if name in ("auto", each) and (not index or index.isdecimal()):
            _begin(f"reprise-wake-{each}", work, find)


def _begin(name: str, function: Callable[..., None], *args: object) -> None:
    threading.Thread(target=function, args=args, name=name, daemon=True).start()


def _cuda(index: int) -> Callable[[], object] | None:
    """Makes the context that CUDA's runtime takes too (CUDA driver API, primary contexts)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # there is none on this machine
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    return lambda: (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), index) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    )


_DRIVERS: dict[str, Callable[[int], Callable[[], object] | None]] = {"cuda": _cuda}
"""By the names of platforms: what starts a device, if its driver is on this machine."""
