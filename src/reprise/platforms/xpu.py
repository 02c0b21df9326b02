"""Intel GPUs."""

from __future__ import annotations

import torch

from reprise.platforms.accelerator import AcceleratorPlatform


class XpuPlatform(AcceleratorPlatform):
    name = "xpu"
    device_type = "xpu"
    dist_backend = "xccl"
    visible_devices_variable = "ZE_AFFINITY_MASK"
    triton_backend = "intel"
    graph_class = "XPUGraph"
    graph_memory = "skip"
    graph_memory_reason = "free memory as the Level Zero driver reports it lags behind captures"
    fp8_dtype = torch.float8_e4m3fn

    @classmethod
    def built_for_this(cls) -> bool:
        return torch.version.xpu is not None
