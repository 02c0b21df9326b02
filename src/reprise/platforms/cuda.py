"""NVIDIA GPUs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable

import torch
from torch.nn.attention import SDPBackend

from reprise.errors import describe
from reprise.platforms.accelerator import AcceleratorPlatform
from reprise.platforms.base import PromptAttention
from reprise.platforms.prompt_attention import CudnnGraphs, by_torch

logger = logging.getLogger(__name__)

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
    keeps_binaries_alone = True
    graph_class = "CUDAGraph"
    graph_memory = "measure"
    graph_memory_reason = "mem_get_info reports what the driver gives to graphs"
    takes_ptx = True
    compiles_by_storage = False

    @classmethod
    def built_for_this(cls) -> bool:
        return torch.version.cuda is not None

    @functools.cached_property
    def supports_pdl(self) -> bool:
        return bool(self.module().get_device_capability(self.index) >= FIRST_WITH_PDL)

    def product_settings(self) -> tuple[Hashable, ...]:
        matmul = torch.backends.cuda.matmul
        return (
            torch.backends.cuda.preferred_blas_library(),
            matmul.allow_fp16_accumulation,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
        )

    @functools.cached_property
    def prompt_attention(self) -> PromptAttention | None:  # type: ignore[override]
        capability = self.module().get_device_capability(self.index)
        if capability not in PROMPTS_BY_CUDNN or not torch.backends.cudnn.is_available():
            return None
        try:
            return CudnnGraphs()
        except Exception as error:  # it may be there, and of another driver or toolkit
            logger.info(
                "cuDNN attends to prompts as torch calls it, with a copy: %s", describe(error)
            )
            return by_torch(SDPBackend.CUDNN_ATTENTION)

    @functools.cached_property
    def fp8_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        return torch.float8_e4m3fn if self.multiplies_fp8 else None

    @functools.cached_property
    def multiplies_fp8(self) -> bool:
        return bool(self.module().get_device_capability(self.index) >= FIRST_WITH_FP8)
