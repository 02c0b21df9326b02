# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of groups of rows, each with its expert's weight of four bits, in Triton.

As :mod:`reprise.ops.experts.grouped_kernel` has it for plain weights. A byte holds the numbers of
two neighbouring inputs: the low halves of a tile are multiplied with its even inputs and the high
ones with its odd inputs, so that nothing of the weight changes places. bfloat16 holds every number
with its power of two; other types go through float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.experts.grouped_kernel import Config
from reprise.ops.experts.groups import Groups
from reprise.ops.experts.tile import finish, tile_of
from reprise.ops.mxfp4_experts.reference import GROUP
from reprise.ops.triton_util import (
    INTERPRETED,
    cdiv,
    depend,
    dot,
    launch,
    launch_options,
    limits,
    next_power_of_2,
)


def launch_grouped(
    x: Tensor,
    weight: Tensor,
    exponents: Tensor,
    groups: Groups,
    out: Tensor,
    config: Config,
    *,
    top: int,
    gated: bool,
    limit: float = 0.0,
) -> None:
    """Multiply each group's rows with its expert's weight.

    Args:
        x: With ``gated`` [T, K], read by the row of each slot; else [T * top, K] in the order of
            groups.
        weight: [E, N, K / 2], contiguous; with ``gated`` [E, 2 * N, K / 2], the rows of the gate
            first.
        exponents: As many rows, [..., K / 32] uint8.
        groups: Of the rows, in tiles of ``config.block_m``.
        out: [T * top, N]: with ``gated`` in the order of groups, what the activation gives; else by
            slot.
        config: Sizes.
        top: Slots of a row.
        gated: This is the first of both products.
        limit: What gates and ups are clamped to; 0: they are not.
    """
    features, inputs = out.shape[1], x.shape[1]
    columns = cdiv(features, config.block_n // 2 if gated else config.block_n)
    block_k = min(config.block_k, next_power_of_2(inputs))
    # What is multiplied is made in registers and has a place beside what arrives.
    made = (config.block_m + config.block_n) * block_k * x.element_size()
    stage = block_k * (config.block_m * x.element_size() + config.block_n // 2)
    stages = max(1, min(config.num_stages, (limits(x.device).shared_memory - made) // stage))
    launch(mxfp4_grouped_kernel, (groups.most * columns,))(
        x,
        weight.view(torch.uint8),
        exponents,
        groups.slots,
        groups.tiles,
        groups.count,
        out,
        features,
        x.stride(0),
        groups.most,
        limit,
        INPUTS=inputs,
        GROUP=GROUP,
        TOP=top,
        GATED=gated,
        CLAMPS=limit != 0,
        WIDEN=INTERPRETED,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        num_warps=config.num_warps,
        num_stages=stages,
        **launch_options(),
    )


@triton.jit
def _numbers(codes, power, kind: tl.constexpr):
    """What the low four bits of each byte stand for (e2m1), times ``power``."""
    bits = codes.to(tl.int16)
    half = ((bits & 8) << 12) | ((bits & 7) << 9)  # float16 of a 16384th
    wide = half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    return (wide * power.to(tl.float32)).to(kind)


@triton.jit
def _powers(exponents):
    """Powers of two, float32: see :func:`reprise.ops.mxfp4_experts.reference.powers`."""
    wide = exponents.to(tl.int32)
    bits = tl.where(wide == 0, 1 << 22, wide << 23)
    bits = tl.where(wide == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["most", "limit"])
def mxfp4_grouped_kernel(
    x_ptr,
    weight_ptr,
    exponents_ptr,
    slots_ptr,
    tiles_ptr,
    count_ptr,
    out_ptr,
    features,
    x_stride,
    most,
    limit,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    CLAMPS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_M rows of ``out`` by BLOCK_N, or half as many, of its columns."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    BYTES: tl.constexpr = BLOCK_K // 2
    SHARED: tl.constexpr = GROUP // 2
    columns = tl.cdiv(features, WIDTH)
    tile = tl.program_id(0) // columns
    column = tl.program_id(0) % columns * WIDTH
    feature = column + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BYTES)
    group = tl.arange(0, BLOCK_K // GROUP)
    inside = (feature < features)[:, None]
    depend(EARLY)
    if tile < tl.load(count_ptr):
        expert, place, real, slot = tile_of(slots_ptr, tiles_ptr, tile, most, BLOCK_M)
        row = slot // TOP if GATED else place
        x_tile = x_ptr + row.to(tl.int64)[:, None] * x_stride + k[None, :]
        at = (expert * (features.to(tl.int64) * (BLOCK_N // WIDTH)) + n)[:, None]
        weight_tile = weight_ptr + at * (INPUTS // 2) + byte[None, :]
        exponent_tile = exponents_ptr + at * (INPUTS // GROUP) + group[None, :]
        kind: tl.constexpr = tl.bfloat16 if x_ptr.dtype.element_ty == tl.bfloat16 else tl.float32
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, INPUTS, BLOCK_K):
            if INPUTS % BLOCK_K == 0:
                codes = tl.load(weight_tile + start // 2, mask=inside, other=0)
                exponents = tl.load(exponent_tile + start // GROUP, mask=inside, other=0)
                x = tl.load(x_tile + start, mask=real[:, None], other=0.0)
            else:
                some = inside & (start // 2 + byte < INPUTS // 2)[None, :]
                codes = tl.load(weight_tile + start // 2, mask=some, other=0)
                some = inside & (start // GROUP + group < INPUTS // GROUP)[None, :]
                exponents = tl.load(exponent_tile + start // GROUP, mask=some, other=0)
                some = real[:, None] & (start + k < INPUTS)[None, :]
                x = tl.load(x_tile + start, mask=some, other=0.0)
            power = _powers(exponents).to(kind)  # all of them are numbers of any kind
            each = tl.broadcast_to(power[:, :, None], [BLOCK_N, BLOCK_K // GROUP, SHARED])
            power = tl.reshape(each, [BLOCK_N, BYTES])
            low, high = _numbers(codes, power, kind), _numbers(codes >> 4, power, kind)
            even, odd = tl.split(tl.reshape(x.to(kind), [BLOCK_M, BYTES, 2]))
            acc = dot(even, low.T, acc, WIDEN)
            acc = dot(odd, high.T, acc, WIDEN)
        finish(acc, out_ptr, place, slot, real, column, features, limit, GATED, False, CLAMPS)
