# mypy: allow-untyped-defs, no-check-untyped-defs
"""Rows as :mod:`few_rows_kernel` multiplies them, in Triton, with the norm before them if there is
one.

A word of a weight holds four pairs of neighbouring inputs, which are operands of the matrix units
where they lie. So the inputs of a step are put in the order in which that makes them: all first
pairs, then all second ones, and so on. The sums of a step's inputs are what makes good for numbers
that are too large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import (
    cdiv,
    depend,
    launch,
    launch_options,
    next_power_of_2,
    warps,
    with_gain,
)

_SHARE = 1024
"""Elements of a program where no program needs the whole row."""


def arrange(
    x: Tensor, step: int, norm_weight: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Inputs in another order, and their sums.

    Args:
        x: [T, K], its elements side by side; K a multiple of ``step``.
        step: Inputs that are multiplied together, a multiple of 8.
        norm_weight: [K], of the root mean square norm before it, or None.
        eps: Of the norm.

    Returns:
        [T, K] float16, and [2, K / step, T] float32: sums of a step, and what its product is to be
        multiplied by.
    """
    rows, inputs = x.shape
    out = x.new_empty((rows, inputs), dtype=torch.float16)
    sums = x.new_empty((2, inputs // step, rows), dtype=torch.float32)
    whole = norm_weight is not None
    share = next_power_of_2(inputs) if whole else min(max(_SHARE, step), next_power_of_2(inputs))
    launch(arrange_kernel, (rows, 1 if whole else cdiv(inputs, share)))(
        x,
        norm_weight,
        out,
        sums,
        rows,
        x.stride(0),
        eps,
        INPUTS=inputs,
        STEP=step,
        SHARE=share,
        num_warps=warps(share, per_thread=16),
        **launch_options(),
    )
    return out, sums


@triton.jit(do_not_specialize=["rows"])
def arrange_kernel(
    x_ptr,
    norm_ptr,
    out_ptr,
    sums_ptr,
    rows,
    x_stride,
    eps,
    INPUTS: tl.constexpr,
    STEP: tl.constexpr,
    SHARE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes a share of a row."""
    row = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1) * (SHARE // STEP) + tl.arange(0, SHARE // STEP)
    within = tl.arange(0, STEP)
    k = step[:, None] * STEP + within[None, :]
    inside = k < INPUTS
    gain = 1.0
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + k, mask=inside, other=0.0)
    depend(EARLY)
    x = tl.load(x_ptr + row * x_stride + k, mask=inside, other=0.0)
    if norm_ptr is not None:
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(tl.sum(wide * wide, axis=1), axis=0) / INPUTS + eps)
        x = with_gain(wide * scale, gain, x.dtype).to(x.dtype)
    x = x.to(tl.float32)
    # float16 holds bfloat16's bits, and its range if each step has a power of two of its own.
    bits = tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True)
    bits = tl.minimum(tl.maximum(bits, 0x00800000), 0x7F000000) & 0x7F800000
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    x = x * inverse[:, None] * 16384.0
    pair = within % 8 // 2
    place = pair * (STEP // 4) + within // 8 * 2 + within % 2
    target = out_ptr + row * INPUTS + step[:, None] * STEP + place[None, :]
    # The numbers of every other pair are 16 times as large.
    tl.store(target, tl.where(pair % 2 == 1, 0.0625, 1.0)[None, :] * x, mask=inside)
    sums_ptr += step * rows + row
    real = step * STEP < INPUTS
    tl.store(sums_ptr, tl.sum(x, axis=1) * 2.0**-24, mask=real)
    tl.store(
        sums_ptr + INPUTS // STEP * rows, bits.to(tl.float32, bitcast=True) * 1024.0, mask=real
    )
