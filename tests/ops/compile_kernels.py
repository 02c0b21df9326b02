"""Compiles every Triton kernel for a device that is not there, and prints what it would need.

    python compile_kernels.py cuda 90 232448
    python compile_kernels.py hip gfx942 65536 once

Arguments: Triton's backend, its architecture, and the bytes of shared memory that a program can
have there; ``once`` compiles of each kernel the first that is launched, and of those that read
eight-bit numbers too. Prints one JSON object a kernel: its name, the bytes of shared memory, the
registers of a thread, what of them spilled to memory (bytes with CUDA, registers with HIP), the
instructions of matrix units, and whether it reads eight-bit numbers; where an op fails, its name
and the error.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from reprise.distributed import ECHO, Communicator, Group
from reprise.distributed.communicator import _known
from reprise.ops import all_ops, registry, triton_util
from reprise.ops.cases import Maker


def main(backend: str, architecture: str, shared_memory: int, *, once: bool) -> None:
    target = GPUTarget(
        backend,
        int(architecture) if backend == "cuda" else architecture,
        64 if architecture.startswith("gfx9") else 32,
    )
    pretend_device(target, shared_memory)
    with Unread():
        for name, compiled in kernels(once=once):
            print(json.dumps({"kernel": name, **compiled}), flush=True)


def pretend_device(target: GPUTarget, shared_memory: int) -> None:
    """Let Triton compile for ``target``, and launch nothing."""
    properties = {
        "multiprocessor_count": 132,
        "max_shared_mem": shared_memory,
        "warpSize": target.warp_size,
    }
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
    triton.runtime.driver.set_active(driver)
    CompiledKernel._init_handles = lambda self: None
    # Where early launch exists, it is compiled too.
    early = SimpleNamespace(
        supports_pdl=target.backend == "cuda" and target.arch >= 90,
        takes_ptx=target.backend == "cuda",
        multiplies_fp8=codes_of(target) is torch.float8_e4m3fn,
        fp8_dtype=None,  # so that no product is left to a BLAS
    )
    # Also for modules that ask for it when they are imported, which no launcher is yet.
    registry.active_platform = triton_util.active_platform = lambda: early
    # What was compiled for an absent device cannot be launched, not even a second time.
    triton_util.launch = lambda kernel, grid: functools.partial(_compile, kernel[grid])


def _compile(launch: Any, *args: Any, **options: Any) -> Any:
    launch(*args, **options)
    return lambda *others: None


def kernels(*, once: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each kernel that the ops' implementations in Triton launch, compiled; ``once``: whatever it
    is called with, but for eight-bit numbers."""
    found: list[tuple[str, dict[str, Any]]] = []
    known: dict[tuple[str, bool], Any] = {}
    coded = False
    original = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        if once and (self.__name__, coded) in known:
            return known[self.__name__, coded]
        compiled = known[self.__name__, coded] = original(self, *args, warmup=True, **kwargs)
        needs = {
            "shared_memory": compiled.metadata.shared,
            "multiplies_by": matrix_instructions(compiled),
            **registers(compiled),
        }
        found.append((self.__name__, needs))
        return compiled

    JITFunction.run = run
    fp8 = codes_of(triton.runtime.driver.active.get_current_target())
    make = EmptyMaker(torch.device("cpu"), torch.bfloat16, fp8)
    for op in all_ops().values():
        ours = [each for each in op.implementations.values() if each.compiles]
        wanted = [each for each in op.cases.workloads(make) if each.compiled] if ours else []
        for workload, implementation in itertools.product(wanted, ours):
            coded = False
            try:
                arguments = workload.arguments()
                coded = fp8 is not None and any(
                    isinstance(x, Tensor) and x.dtype == fp8 for x in arguments.values()
                )
                implementation.function(**arguments)
            except Exception as error:
                reason = f"{workload.shape}: {type(error).__name__}: {error}"
                found.append((op.name, {"error": reason[:2000]}))
            for kernel, needs in found:
                yield kernel, {"on_codes": coded, **needs}
            found.clear()
    coded = False
    over_ranks(make)
    yield from ((kernel, {"on_codes": False, **needs}) for kernel, needs in found)


def codes_of(target: GPUTarget) -> torch.dtype | None:
    """What the platform of such a device says its eight-bit numbers are: none before they can be
    multiplied, and Triton has none there either."""
    if target.backend == "hip":
        return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn if target.arch >= 89 else None


def over_ranks(make: Maker) -> None:
    """Of eight ranks, of which an op's cases have one."""
    sums = importlib.import_module("reprise.ops.all_reduce.triton")
    beside = importlib.import_module("reprise.ops.all_gather.triton")
    moved = importlib.import_module("reprise.ops.dispatch.triton")
    buffer: Any = SimpleNamespace(
        bases=make.randint(1, 8),
        turns=make.randint(1, 512, dtype=torch.int32),
        given_up=make.randint(1, 1, dtype=torch.int32),
        group=SimpleNamespace(rank=0, size=8),
    )
    sums.push(buffer, make.randn(64, 4096), make.randn(64, 4096), add=True)
    for width in (4096, 8192):
        rows = make.randn(64, width), make.randn(64, width)
        sums.push_norm(buffer, *rows, make.randn(width), 1e-6)
    beside.push_beside(buffer, make.randn(2, 4096), make.randn(2, 32768), 512)
    beside.all_gather(make.randn(64, 4096), make.randn(64, 8192), ECHO.name)
    group = Group("compiled", 0, 8)
    ranks = _known[group.name] = Communicator(group)
    ranks.symmetric = buffer
    x, all_x = make.randn(4, 2048), make.randn(32, 2048)
    weights, ids = make.randn(4, 8, dtype=torch.float32), make.randint(128, 4, 8).int()
    all_weights, all_ids = weights.repeat(8, 1), ids.repeat(8, 1)
    where = 0, 16, 16
    moved.dispatch(x, weights, ids, *where, all_x, all_weights, all_ids, group.name)
    moved.combine(all_x, all_ids, ids, *where, x, group.name)


def matrix_instructions(compiled: Any) -> list[str]:
    """Those of the matrix units that it has, each once."""
    code = compiled.asm.get("amdgcn") or compiled.asm["ptx"]
    return sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|v_mfma)[\w.:]*", code)))


def registers(compiled: Any) -> dict[str, int]:
    """What a thread has of them, and what did not fit."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        count = {name: int(n) for name, n in re.findall(r"\.(\w+_count):\s+(\d+)", code)}
        spills = count["vgpr_spill_count"] + count["sgpr_spill_count"]
        return {"registers": count["vgpr_count"], "spills": spills}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", done.stdout)}
    return {"registers": used["REG"], "spills": used["STACK"]}


class EmptyMaker(Maker):
    """Makes inputs whose content nobody reads."""

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)

    def randint(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype)


class Unread(TorchDispatchMode):
    """Scaling such inputs, and products of them that are torch's, have their shapes and dtypes and
    no content either: of weights of large models it would take longer than their kernels."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        by_number = func is torch.ops.aten.div.Tensor and isinstance(args[1], float)
        if by_number and args[0].is_floating_point():
            return torch.empty_like(args[0])
        if func is torch.ops.aten.mm.default:
            return args[0].new_empty(len(args[0]), args[1].shape[1])
        if func is torch.ops.aten.addmm.out:
            return (kwargs or {})["out"]
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), once=sys.argv[4:] == ["once"])
