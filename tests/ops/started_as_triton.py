"""Compares launches with those of the Triton that is installed, for a device that is not there:
what it compiles, and how it calls a launcher. Each of its launchers takes such a call.

    python started_as_triton.py

In a process of its own: once a kernel was interpreted, its language no longer compiles.
"""

from __future__ import annotations

import inspect
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.amd.driver import HIPLauncher
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher

from reprise.ops import triton_util


@triton.jit
def some_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, size, flag, factor, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=0.0)
    if ADD:
        x += factor
    if y_ptr is not None:
        x += tl.load(y_ptr + index, mask=index < size)
    tl.store(x_ptr + index, x, mask=index < size)


def main() -> None:
    calls: list[tuple[Any, ...]] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.early = metadata.launch_pdl

        def __call__(self, *args: Any) -> None:
            calls.append((self.early, *args))

    driver = SimpleNamespace(
        launcher_cls=Launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        utils=SimpleNamespace(
            load_binary=lambda *args: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
            unload_module=lambda module: None,
        ),
    )
    triton.runtime.driver.set_active(driver)
    x = torch.zeros(64)
    for args, options in [
        ((x, x, 5, True, 0.5), {"BLOCK": 16, "ADD": True}),
        ((x, None, 1, False, 0.5), {"BLOCK": 16, "ADD": False, "num_warps": 2}),
        ((x[1:], x, 16, True, 2.0), {"BLOCK": 32, "ADD": True, "launch_pdl": True}),
    ]:
        some_kernel[(3,)](*args, **options)
        triton_util.launch(some_kernel, (3,))(*args, **options)  # asks Triton
        again = triton_util.launch(some_kernel, (3,))(*args, **options)
        again(*args)
        theirs, _, *ours = calls
        assert len(ours) == 2
        for call in ours:
            assert call[:7] == theirs[:7]
            assert call[7:10] == (None, None, None), "what profilers would be told, and theirs"
            assert all(a is b for a, b in zip(call[10:], theirs[10:], strict=True))
        calls.clear()
    for launcher in (CudaLauncher, HIPLauncher):
        inspect.signature(launcher.__call__).bind(None, *ours[0][1:])
    watchers = triton_util._watchers
    assert isinstance(watchers.launch_enter_hook.calls, list)
    assert isinstance(watchers.launch_exit_hook.calls, list)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        triton.knobs.cache.dir = directory
        main()
