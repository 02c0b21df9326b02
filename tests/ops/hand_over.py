"""Has kernels compiled by a process beside, for a device that is not there, and prints what came of
it as lines of JSON.

    python hand_over.py

In a process of its own: where a kernel was interpreted, none is compiled any more.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from reprise import kernels_beside
from reprise.ops import handed_over, triton_util
from reprise.ops.rms_norm.triton import rms_norm, rms_norm_kernel

launched: list[str] = []
generated: list[str] = []
told: list[str] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.name

    def __call__(self, *args: Any) -> None:
        launched.append(self.name)


@triton.jit
def nowhere_kernel(x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)


def pretend_device() -> None:
    properties = {"max_shared_mem": 1 << 17, "multiprocessor_count": 132, "warpSize": 32}
    driver = SimpleNamespace(
        launcher_cls=Launcher,
        get_current_device=lambda: -1,
        get_current_stream=lambda device: 7,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        utils=SimpleNamespace(
            load_binary=lambda *args: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda device: properties,
            unload_module=lambda module: None,
        ),
    )
    triton.runtime.driver.set_active(driver)
    original = triton.compiler.ASTSource.make_ir

    def make_ir(self: Any, *args: Any, **kwargs: Any) -> Any:
        generated.append(self.name)
        return original(self, *args, **kwargs)

    triton.compiler.ASTSource.make_ir = make_ir


def say(scenario: str, **found: Any) -> None:
    lists = {"launched": launched, "generated": generated, "told": told}
    print(json.dumps({"scenario": scenario, **{k: list(v) for k, v in lists.items()}, **found}))
    for each in lists.values():
        each.clear()


def norm(width: int) -> None:
    rms_norm(torch.ones(4, width), torch.ones(width), 1e-6)


def nowhere() -> None:
    triton_util.launch(nowhere_kernel, (1,))(torch.ones(16), BLOCK=16)


def main(directory: Path) -> None:
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    handed_over.logger.addHandler(handler)
    handed_over.logger.setLevel(logging.INFO)
    pretend_device()
    start = handed_over.Start()
    beside = kernels_beside._beside = kernels_beside.Beside(2)
    triton.knobs.cache.dir = str(directory)  # which the process does not see
    with start.asking():
        for width in (64, 128):
            norm(width)
        nowhere()
    say("asked", asked=len(start._asked), kept=len(list(directory.glob("*/*.cubin"))))
    with start.calling():
        for width in (64, 128):
            norm(width)
        say("called")
        nowhere()
        say("of no module")
        try:
            options = {"SIZE": 3, "HEADS": 1, "BLOCK": 3, "ROWS": 1, "EARLY": False}
            x = torch.ones(4, 3)
            triton_util.launch(rms_norm_kernel, (1,))(x, x, x, 4, 3, 3, 1e-6, **options)
        except triton.CompilationError as error:
            say("does not compile", raised=str(error))
        os.kill(beside.pid, signal.SIGSTOP)
        with start.asking():
            norm(256)
        os.kill(beside.pid, signal.SIGKILL)
        norm(256)
        say("the process dies")
        norm(512)
        say("it is dead")
    kernels_beside.end()
    with start.calling():
        norm(1024)
    say("of few", begun=kernels_beside.begun() is not None)
    again = handed_over.Start()
    for _ in range(2):
        for each in (rms_norm_kernel, triton_util):
            getattr(each, "device_caches", {}).clear()
        triton_util._kinds.clear()
        with again.calling(begins=True):
            norm(64)
    say("all kept", begun=kernels_beside.begun() is not None)
    with again.calling(begins=True):
        norm(2048)
    say("one is missing that all have", begun=kernels_beside.begun() is not None)
    kernels_beside.end()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
