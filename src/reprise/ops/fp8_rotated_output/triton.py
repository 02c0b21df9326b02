# mypy: allow-untyped-defs, no-check-untyped-defs
"""Rotation and quantisation in one kernel, and all groups' products in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.fp8_linear.product_kernel import launch_product
from reprise.ops.fp8_linear.quantise_kernel import eight_bits
from reprise.ops.fp8_linear.reference import LARGEST, LEAST_MAGNITUDE
from reprise.ops.fp8_linear.scaled_mm import FOUR, multiply
from reprise.ops.fp8_linear.triton import for_blas
from reprise.ops.registry import active_platform
from reprise.ops.rotary_tail.turn import turn
from reprise.ops.triton_util import (
    INTERPRETED,
    cdiv,
    depend,
    launch,
    launch_options,
    next_power_of_2,
    warps,
)

_TILE = 4096
"""Elements of a program: a group of several heads of one token, which share its angles."""


def fp8_rotated_output(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor,
    scale: Tensor,
    groups: int,
    block_n: int,
    block_k: int,
) -> Tensor:
    """Shapes as in the reference."""
    platform = active_platform()
    native = platform is not None and platform.multiplies_fp8
    rows = len(x)
    like = x.new_empty((rows, weight.shape[1]))
    if for_blas(like, weight[: len(weight) // groups], block_n, block_k):
        room = cdiv(rows, FOUR) * FOUR
        given = quantised(x, positions, cos_sin, groups, block_k, True, room)
        each = zip(*given, weight.chunk(groups), scale.chunk(groups), strict=True)
        parts = [
            multiply(numbers, scales.t(), one, by, None, block_n, x.dtype)[:rows]
            for numbers, scales, one, by in each
        ]
        return torch.cat(parts, dim=1)
    out = x.new_empty((rows, len(weight)))
    given = quantised(x, positions, cos_sin, groups, block_k, native)
    launch_product(*given, weight, scale, None, out, block_n, groups=groups)
    return out


def quantised(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    groups: int,
    group: int,
    native: bool,
    room: int = 0,
) -> tuple[Tensor, Tensor]:
    """Eight bits for each element of what is rotated back, as the reference has them.

    Args:
        x: [T, H, D]; tokens and heads may be strided.
        positions: [T].
        cos_sin: [P, R].
        groups: G, of heads.
        group: Elements that share a scale; it divides D.
        native: As of :func:`reprise.ops.fp8_linear.quantise_kernel.quantise`.
        room: As there.

    Returns:
        [G, T, H / G * D], and scales [G, H / G * D / group, T].
    """
    tokens, heads, size = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    each, room = heads // groups, room or tokens
    kind = torch.float8_e4m3fn if native else x.dtype
    numbers = x.new_empty((groups, room, each * size), dtype=kind)
    scales = x.new_empty((groups, each * size // group, room), dtype=torch.float32)
    here = min(next_power_of_2(heads), _TILE // group)
    launch(rotate_quantise_kernel, (tokens * (size // group), cdiv(heads, here)))(
        x,
        positions,
        cos_sin,
        numbers,
        scales,
        x.stride(0),
        x.stride(1),
        cos_sin.stride(0),
        room,
        HEADS=heads,
        EACH=each,
        SIZE=size,
        HALF=cos_sin.shape[1] // 2,
        GROUP=group,
        HEADS_HERE=here,
        NATIVE=native,
        EXACT=not INTERPRETED,
        LARGEST=LARGEST,
        LEAST=LEAST_MAGNITUDE,
        num_warps=warps(group * here, per_thread=32),
        **launch_options(),
    )
    return numbers, scales


@triton.jit(do_not_specialize=["room"])
def rotate_quantise_kernel(
    x_ptr,
    positions_ptr,
    cos_sin_ptr,
    numbers_ptr,
    scales_ptr,
    token_stride,
    head_stride,
    angle_stride,
    room,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_HERE: tl.constexpr,
    NATIVE: tl.constexpr,
    EXACT: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes a group of HEADS_HERE heads of a token. Groups of a head are programs side
    by side: a row of eight bits is a row of the tile, and most have nothing that rotates."""
    PARTS: tl.constexpr = SIZE // GROUP
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    start = tl.program_id(0) % PARTS * GROUP
    head = tl.program_id(1) * HEADS_HERE + tl.arange(0, HEADS_HERE)
    inside = head < HEADS
    channel = tl.arange(0, GROUP)[None, :]
    angles = cos_sin_ptr + tl.load(positions_ptr + token) * angle_stride
    depend(EARLY)
    source = x_ptr + token * token_stride + head[:, None] * head_stride + start + channel
    x = tl.load(source, mask=inside[:, None], other=0.0)
    y = x.to(tl.float32)
    if start + GROUP > SIZE - 2 * HALF:
        y = turn(y, angles, SIZE - start, HALF, GROUP, True).to(x.dtype).to(tl.float32)
    y, scale = eight_bits(y, NATIVE, EXACT, LARGEST, LEAST)
    which, place = (head // EACH).to(tl.int64), head % EACH * SIZE + start
    target = numbers_ptr + ((which * room + token) * (EACH * SIZE) + place)[:, None] + channel
    tl.store(target, y.to(numbers_ptr.dtype.element_ty), mask=inside[:, None])
    line = which * (EACH * SIZE // GROUP) + place // GROUP
    tl.store(scales_ptr + line * room + token, scale, mask=inside)
