"""Products of eight bits through the device's BLAS, which torch calls ``scaled_mm``."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.errors import describe
from reprise.ops.fp8_linear.reference import quantise
from reprise.ops.fp8_linear.reference import reference as fallback
from reprise.platforms import Platform

BLOCK = 128
_ALIGNED = 16
"""Inputs and outputs are a multiple of it."""
_ROWS = 4
"""Rows with scales of blocks are a multiple of it."""


def requires(platform: Platform) -> str | None:
    """Whether the device multiplies so: it is tried, since no version or name of a device says."""
    if platform.fp8_dtype is not torch.float8_e4m3fn:
        return "the platform does not compute in float8_e4m3fn"
    return _tried(platform.device)


@functools.cache
def _tried(device: torch.device) -> str | None:
    x = torch.ones(5, 2 * BLOCK, dtype=torch.bfloat16, device=device)
    weight = torch.ones(3 * BLOCK, 2 * BLOCK, device=device).to(torch.float8_e4m3fn)
    try:
        for block_n, block_k in ((BLOCK, BLOCK), (1, 2 * BLOCK)):
            scale = x.new_ones(len(weight) // block_n, x.shape[1] // block_k, dtype=torch.float32)
            fp8_linear(x, weight, scale, None, block_n, block_k)
    except Exception as error:  # torch says so with errors of several types
        return f"torch's scaled_mm does not compute here: {describe(error)}"
    return None


def accepts(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> str | None:
    if x.dtype is not torch.bfloat16:
        return "results are bfloat16"
    if x.shape[1] % _ALIGNED:
        return f"inputs must be a multiple of {_ALIGNED}"
    channels = block_n == 1 and block_k == x.shape[1]
    if not channels and ((block_n, block_k) != (BLOCK, BLOCK) or x.shape[1] % BLOCK):
        return f"scales are of whole blocks of {BLOCK} by {BLOCK}, or of outputs"
    return None


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    """Shapes as in the reference, whose outputs it leaves to it where they are no multiple of 16.

    It sums in the accumulators of the matrix units for one block of inputs at a time, and adds
    these sums up in float32.
    """
    if weight.shape[0] % _ALIGNED:
        return fallback(x, weight, scale, bias, block_n, block_k)
    padded = F.pad(x, (0, 0, 0, -len(x) % _ROWS)) if block_n > 1 else x
    return multiply(*quantise(padded, block_k), weight, scale, bias, block_n, x.dtype)[: len(x)]


def multiply(
    numbers: Tensor,
    scales: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    dtype: torch.dtype,
) -> Tensor:
    """The product of activations that are quantised already.

    Args:
        numbers: [T, K] float8_e4m3fn; T is a multiple of 4 unless ``block_n`` is 1.
        scales: [T, ceil(K / block_k)] float32.
        weight: As in the reference, as are the next three.
        scale: See there.
        bias: See there.
        block_n: See there.
        dtype: Of the result, [T, N].
    """
    if block_n == 1:
        weight_scale = scale.t()
    else:
        # The BLAS reads the first side by side along rows of activations, and rows of the second
        # from addresses that are multiples of 16 bytes.
        scales = scales.t().contiguous().t()
        weight_scale = F.pad(scale, (0, -scale.shape[1] % 4)).t()
    return torch._scaled_mm(
        numbers, weight.t(), scales, weight_scale, bias, out_dtype=dtype, use_fast_accum=False
    )
