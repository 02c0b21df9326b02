"""AMD GPUs. PyTorch's ROCm build presents them as device type ``cuda``."""

from __future__ import annotations

import torch

from reprise.platforms.accelerator import AcceleratorPlatform


class RocmPlatform(AcceleratorPlatform):
    name = "rocm"
    device_type = "cuda"
    dist_backend = "nccl"
    visible_devices_variable = "HIP_VISIBLE_DEVICES"
    triton_backend = "amd"
    graph_class = "CUDAGraph"
    graph_memory = "skip"
    graph_memory_reason = "no conformance record shows that HIP's free memory heeds captures"
    fp8_dtype = torch.float8_e4m3fnuz

    @classmethod
    def built_for_this(cls) -> bool:
        return torch.version.hip is not None
