"""Products of eight bits through the device's BLAS, which torch calls ``scaled_mm``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.errors import describe
from reprise.ops.fp8_linear.reference import fp8_linear as fallback
from reprise.ops.fp8_linear.reference import quantise
from reprise.platforms import Platform

BLOCK = 128
_ALIGNED = 16
"""Inputs and outputs are a multiple of it."""
FOUR = 4
"""With scales of blocks, rows are a multiple of it, and so are blocks along the inputs: the BLAS
reads four scales at once."""


def requires(platform: Platform) -> str | None:
    """Whether the device multiplies so: it is tried, since no version or name of a device says."""
    if platform.fp8_dtype is not torch.float8_e4m3fn:
        return "the platform does not compute in float8_e4m3fn"
    return _tried(platform.device)


@functools.cache
def _tried(device: torch.device) -> str | None:
    inputs = FOUR * BLOCK
    x = torch.ones(5, inputs, dtype=torch.bfloat16, device=device)
    weight = torch.ones(3 * BLOCK, inputs, dtype=torch.float32, device=device).to(
        torch.float8_e4m3fn
    )
    try:
        for block_n, block_k in ((BLOCK, BLOCK), (1, inputs)):
            scale = x.new_ones(len(weight) // block_n, x.shape[1] // block_k, dtype=torch.float32)
            product = fp8_linear(x, weight, scale, None, block_n, block_k)
            product.sum().item()  # what a device has queued may fail when it runs: wait for it
    except Exception as error:  # torch says so with errors of several types
        return f"torch's scaled_mm does not compute here: {describe(error)}"
    return None


def accepts(x: Tensor, block_n: int, block_k: int, **_: Any) -> str | None:
    if x.dtype is not torch.bfloat16:
        return "results are bfloat16"
    if x.shape[1] % _ALIGNED:
        return f"inputs must be a multiple of {_ALIGNED}"
    if block_n == 1 and block_k == x.shape[1]:
        return None
    if (block_n, block_k) != (BLOCK, BLOCK):
        return f"scales are of blocks of {BLOCK} by {BLOCK}, or of outputs"
    if x.shape[1] % (FOUR * BLOCK):
        return f"inputs with scales of blocks must be a multiple of {FOUR * BLOCK}"
    return None


def takes(x: Tensor, weight: Tensor, block_n: int, block_k: int) -> bool:
    """Whether :func:`multiply` computes it."""
    return accepts(x, block_n, block_k) is None and weight.shape[0] % _ALIGNED == 0


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    """Shapes as in the reference, whose outputs it leaves to it where they are no multiple of 16.

    It sums in the accumulators of the matrix units for one block of inputs at a time, and adds
    these sums up in float32.
    """
    if not takes(x, weight, block_n, block_k):
        return fallback(x, weight, scale, bias, block_n, block_k)
    padded = F.pad(x, (0, 0, 0, -len(x) % FOUR)) if block_n > 1 else x
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
    weight_scale = scale.t()
    if block_n > 1:
        # The BLAS has the rows of the activations' scales side by side.
        scales = scales.t().contiguous().t()
    return torch._scaled_mm(
        numbers, weight.t(), scales, weight_scale, bias, out_dtype=dtype, use_fast_accum=False
    )
