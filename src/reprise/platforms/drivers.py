"""What devices' drivers do at their first use, begun before torch is imported.

A driver takes half a second to find its devices and to make a context on one, torch takes longer to
import, and neither needs the other. So nothing here imports it. Whatever fails is left to torch,
which says what is wrong when it comes to the same place.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable


def wake(device: str = "auto", then: Callable[[], None] = lambda: None) -> None:
    """Begin, in a thread beside whatever comes next. For processes that will have an engine and
    make no fork before: a driver does not survive one.

    Args:
        device: On which the engine will compute, as users name it.
        then: Called in the thread if there is such a device.
    """
    name, _, index = device.partition(":")

    def work(start: Callable[[int], bool]) -> None:
        if start(int(index or 0)):
            then()

    for each, start in _STARTS.items():
        if name in ("auto", each) and (not index or index.isdecimal()):
            threading.Thread(
                target=work, args=(start,), name=f"reprise-wake-{each}", daemon=True
            ).start()


def _wake_cuda(index: int) -> bool:
    """Make the context that CUDA's runtime takes too (CUDA driver API, primary contexts)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # there is none on this machine
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), index) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    )


_STARTS: dict[str, Callable[[int], bool]] = {"cuda": _wake_cuda}
"""By the names of platforms."""
