"""AMD GPUs. PyTorch's ROCm build presents them as device type ``cuda``."""

from __future__ import annotations

import functools

import torch

from reprise.platforms.accelerator import AcceleratorPlatform

_FP8 = {
    "gfx94": torch.float8_e4m3fnuz,
    "gfx95": torch.float8_e4m3fn,
    "gfx12": torch.float8_e4m3fn,
}
"""By the beginning of an architecture's name (AMD's CDNA 3, CDNA 4 and RDNA 4 instruction sets)."""


class RocmPlatform(AcceleratorPlatform):
    name = "rocm"
    device_type = "cuda"
    dist_backend = "nccl"
    visible_devices_variable = "HIP_VISIBLE_DEVICES"
    triton_backend = "amd"
    keeps_binaries_alone = True
    graph_class = "CUDAGraph"
    graph_memory = "skip"
    graph_memory_reason = "no conformance record shows that HIP's free memory heeds captures"

    @functools.cached_property
    def fp8_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        name = str(self.module().get_device_properties(self.index).gcnArchName)
        return next((dtype for prefix, dtype in _FP8.items() if name.startswith(prefix)), None)

    @classmethod
    def built_for_this(cls) -> bool:
        return torch.version.hip is not None
