"""NVIDIA GPUs."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention import SDPBackend

from reprise.platforms.accelerator import AcceleratorPlatform

FIRST_WITH_PDL = (9, 0)
"""Compute capability (CUDA programming guide, programmatic dependent launch)."""
FIRST_WITH_FP8 = (8, 9)
"""The same (PTX ISA, ``mma`` and ``cvt`` with ``.e4m3``)."""
PROMPTS_BY_CUDNN = ((9, 0),)
"""Where cuDNN's attention was measured to be faster: docs/kernels.md."""


class CudaPlatform(AcceleratorPlatform):
    name = "cuda"
    device_type = "cuda"
    dist_backend = "nccl"
    visible_devices_variable = "CUDA_VISIBLE_DEVICES"
    triton_backend = "nvidia"
    graph_class = "CUDAGraph"
    graph_memory = "measure"
    graph_memory_reason = "mem_get_info reports what the driver gives to graphs"
    takes_ptx = True

    @classmethod
    def built_for_this(cls) -> bool:
        return torch.version.cuda is not None

    @functools.cached_property
    def supports_pdl(self) -> bool:
        return bool(self.module().get_device_capability(self.index) >= FIRST_WITH_PDL)

    @functools.cached_property
    def prompt_attention(self) -> SDPBackend | None:  # type: ignore[override]
        capability = self.module().get_device_capability(self.index)
        measured = capability in PROMPTS_BY_CUDNN and torch.backends.cudnn.is_available()
        return SDPBackend.CUDNN_ATTENTION if measured else None

    @functools.cached_property
    def fp8_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        return torch.float8_e4m3fn if self.multiplies_fp8 else None

    @functools.cached_property
    def multiplies_fp8(self) -> bool:
        return bool(self.module().get_device_capability(self.index) >= FIRST_WITH_FP8)
