# mypy: allow-untyped-defs, no-check-untyped-defs
"""Activations of eight bits in Triton, with the norm before them if there is one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.fp8_linear.reference import LARGEST, LEAST_MAGNITUDE
from reprise.ops.triton_util import (
    INTERPRETED,
    cdiv,
    depend,
    launch,
    launch_options,
    limits,
    next_power_of_2,
    warps,
    with_gain,
)

_SHARE = 1024
"""Elements of a program where no program needs the whole row."""
_FEW_ROWS, _FEW_SHARE = 64, 512
"""The same of up to so many rows, whose threads have fewer divisions one after the other."""


def quantise(
    x: Tensor,
    group: int,
    native: bool,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    room: int = 0,
    *,
    alike: bool = False,
) -> tuple[Tensor, Tensor]:
    """Eight bits for each element, as the reference has them.

    Args:
        x: [T, K], its elements side by side; K a multiple of the group.
        group: Inputs that share a scale: a power of two, or K.
        native: Return float8_e4m3fn; else the same numbers in the dtype of ``x``, which holds them.
        norm_weight: [K], of the root mean square norm before it, or None.
        eps: Of the norm.
        room: Rows of the results, of which those behind T are left as they are; 0: T.
        alike: A row has the same bits beside any others: a norm's sum is in one order.

    Returns:
        [T, K], and scales [K / group, T] float32.
    """
    rows, inputs = x.shape
    room = room or rows
    numbers = x.new_empty((room, inputs), dtype=torch.float8_e4m3fn if native else x.dtype)
    scales = x.new_empty((inputs // group, room), dtype=torch.float32)
    whole = norm_weight is not None or group == inputs
    few = rows <= _FEW_ROWS and not alike
    most = next_power_of_2(inputs)
    share = most if whole else min(max(_FEW_SHARE if few else _SHARE, group), most)
    launch(quantise_kernel, (rows, 1 if whole else cdiv(inputs, share)))(
        x,
        norm_weight,
        numbers,
        scales,
        room,
        x.stride(0),
        eps,
        INPUTS=inputs,
        GROUP=share if group == inputs else group,
        SHARE=share,
        NATIVE=native,
        EXACT=not INTERPRETED,
        LARGEST=LARGEST,
        LEAST=LEAST_MAGNITUDE,
        num_warps=warps(share, 4, limits(x.device).warps) if few else warps(share, 16),
        **launch_options(),
    )
    return numbers, scales


@triton.jit
def nearest(y):
    """float32 of at most 448 to what eight bits (e4m3) hold, ties to even; float32."""
    low = (y + 24576.0) - 24576.0  # 1.5 * 2**14: its unit in the last place is 2**-9
    bits = y.to(tl.int32, bitcast=True)
    high = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(y) < 0.015625, low, high)  # 2**-6, the least normal number


@triton.jit
def eight_bits(
    x, NATIVE: tl.constexpr, EXACT: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr
):
    """x: [N, GROUP] float32, of which a row shares a scale. What becomes of it, float32 that eight
    bits hold, unless NATIVE leaves the rounding to a conversion; and the scales."""
    magnitude = tl.maximum(tl.max(tl.abs(x), axis=1), LEAST)
    largest = tl.full([x.shape[0]], LARGEST, dtype=tl.float32)
    if EXACT:
        scale = tl.div_rn(magnitude, largest)
        # One division for all quotients of a scale: what a product with the inverse leaves over
        # makes it the nearest number to the quotient (Markstein, 1990).
        inverse = tl.div_rn(tl.full([x.shape[0]], 1.0, dtype=tl.float32), scale)[:, None]
        near = x * inverse
        y = tl.fma(tl.fma(-near, scale[:, None], x), inverse, near)
    else:  # the interpreter's division is
        scale = magnitude / largest
        y = x / scale[:, None]
    y = tl.clamp(y, -LARGEST, LARGEST)
    if not NATIVE:
        y = nearest(y)
    return y, scale


@triton.jit(do_not_specialize=["room"])
def quantise_kernel(
    x_ptr,
    norm_ptr,
    numbers_ptr,
    scales_ptr,
    room,
    x_stride,
    eps,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    NATIVE: tl.constexpr,
    EXACT: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program quantises a share of a row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * (SHARE // GROUP) + tl.arange(0, SHARE // GROUP)
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = k < INPUTS
    gain = 1.0
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + k, mask=inside, other=0.0)
    depend(EARLY)
    loaded = tl.load(x_ptr + row * x_stride + k, mask=inside, other=0.0)
    x = loaded.to(tl.float32)
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / INPUTS + eps)
        x = with_gain(x * scale, gain, loaded.dtype).to(loaded.dtype).to(tl.float32)
    y, scale = eight_bits(x, NATIVE, EXACT, LARGEST, LEAST)
    number = y.to(numbers_ptr.dtype.element_ty)
    tl.store(numbers_ptr + row * INPUTS + k, number, mask=inside)
    tl.store(scales_ptr + group * room + row, scale, mask=group * GROUP < INPUTS)
