"""The simulated accelerator as a platform of Reprise: data, and what its driver does otherwise."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

import reprise_sim
from reprise.platforms.accelerator import AcceleratorPlatform
from reprise.platforms.cpu import cpp_compiler_missing


class SimPlatform(AcceleratorPlatform):
    name = "sim"
    device_type = "sim"
    priority: ClassVar[int] = -1  # for who asks for it
    dist_backend = "simgloo"
    visible_devices_variable = None
    graph_class = "SimGraph"
    graph_memory = "measure"
    graph_memory_reason = "the allocator's segments are all that graphs take"
    fp8_dtype = torch.float8_e4m3fn
    reserve_bytes: ClassVar[int] = 64 << 20
    default_batched_tokens: ClassVar[int] = 1024
    preferred: ClassVar = {"*": ("sim", "torch", "reference")}

    def __init__(self, index: int = 0) -> None:
        self.module()
        from reprise_sim import kernels  # noqa: F401 - declares them

        super().__init__(index)

    @classmethod
    def unavailable_reason(cls) -> str | None:
        # Asking loads nothing: torch has one slot for such devices, and one accelerator a process.
        return reprise_sim.missing()

    @classmethod
    def module(cls) -> Any:
        reprise_sim.load()
        return super().module()

    @classmethod
    def device_count(cls) -> int:
        return int(cls.module().device_count())

    def prefers_dtype(self, dtype: torch.dtype) -> bool:
        return dtype is torch.float32  # its kernels are the CPU's

    def compiler_missing(self) -> str | None:
        return cpp_compiler_missing()  # reprise_sim/compiler.py

    @property
    def default_dtype(self) -> torch.dtype:
        return torch.float32
