# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of groups of rows, each with its expert's weight, on the matrix units; and the weighted
sum over a row's experts.

A program takes one tile of :mod:`groups`, so that an expert that no row has been sent to costs
nothing, and one that few have been sent to reads its weight once. Programs next to each other
multiply the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.experts.groups import Groups
from reprise.ops.experts.tile import finish, tile_of
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


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    block_m: int
    """Rows of a tile."""
    block_n: int
    """Rows of the weight that a tile takes; with an activation one half are gates."""
    block_k: int
    """Inputs of one step of the inner loop."""
    num_stages: int
    """At most: fewer where shared memory holds fewer tiles of both operands."""
    num_warps: int
    swap: bool = False
    """The weight is the left operand: the matrix units of Hopper take 64 rows of that and as few
    of the other as there are."""
    together: int = 1
    """Steps of the inner loop that are read at a time, where the kernel can and they divide it."""


def launch_grouped(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    out: Tensor,
    config: Config,
    *,
    top: int,
    gated: bool,
) -> None:
    """Multiply each group's rows with its expert's weight.

    Args:
        x: With ``gated`` [T, K], read by the row of each slot; else [T * top, K] in the order of
            groups.
        weight: [E, N, K], contiguous; with ``gated`` [E, 2 * N, K], the rows of the gate first.
        groups: Of the rows, in tiles of ``config.block_m``.
        out: [T * top, N]: with ``gated`` in the order of groups, ``silu(gate) * up``; else by slot.
        config: Sizes.
        top: Slots of a row.
        gated: This is the first of both products.
    """
    features = out.shape[1]
    width = config.block_n // 2 if gated else config.block_n
    columns = cdiv(features, width)
    inputs = weight.shape[2]
    block_k = min(config.block_k, max(16, next_power_of_2(inputs)))
    stage = (config.block_m + config.block_n) * block_k * x.element_size()
    stages = max(1, min(config.num_stages, limits(x.device).shared_memory // stage))
    launch(grouped_kernel, (groups.most * columns,))(
        x,
        weight,
        groups.slots,
        groups.tiles,
        groups.count,
        out,
        features,
        x.stride(0),
        groups.most,
        INPUTS=inputs,
        TOP=top,
        GATED=gated,
        SWAP=config.swap,
        WIDEN=INTERPRETED,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        num_warps=config.num_warps,
        num_stages=stages,
        **launch_options(),
    )


@triton.jit(do_not_specialize=["most"])
def grouped_kernel(
    x_ptr,
    weight_ptr,
    slots_ptr,
    tiles_ptr,
    count_ptr,
    out_ptr,
    features,
    x_stride,
    most,
    INPUTS: tl.constexpr,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    SWAP: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_M rows of ``out`` by BLOCK_N, or half as many, of its columns."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    columns = tl.cdiv(features, WIDTH)
    tile = tl.program_id(0) // columns
    column = tl.program_id(0) % columns * WIDTH
    feature = column + tl.arange(0, BLOCK_N) % WIDTH
    k = tl.arange(0, BLOCK_K)
    depend(EARLY)
    if tile < tl.load(count_ptr):
        expert, place, real, slot = tile_of(slots_ptr, tiles_ptr, tile, most, BLOCK_M)
        row = slot // TOP if GATED else place
        x_tile = x_ptr + row.to(tl.int64)[:, None] * x_stride + k[None, :]
        n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
        n = n + expert * ((2 if GATED else 1) * features)
        weight_tile = weight_ptr + n[:, None] * INPUTS + k[None, :]
        inside = (feature < features)[:, None]
        if SWAP:
            acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        else:
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, INPUTS, BLOCK_K):
            if INPUTS % BLOCK_K == 0:
                x = tl.load(x_tile + start, mask=real[:, None], other=0.0)
                weight = tl.load(weight_tile + start, mask=inside, other=0.0)
            else:
                some = (start + k < INPUTS)[None, :]
                x = tl.load(x_tile + start, mask=real[:, None] & some, other=0.0)
                weight = tl.load(weight_tile + start, mask=inside & some, other=0.0)
            if SWAP:
                acc = dot(weight, x.T, acc, WIDEN)
            else:
                acc = dot(x, weight.T, acc, WIDEN)
        finish(acc, out_ptr, place, slot, real, column, features, 0.0, GATED, SWAP, False)


def launch_combine(
    products: Tensor, weights: Tensor, ids: Tensor, experts: int, out: Tensor, *, add: bool
) -> None:
    """Write to ``out`` [T, D] the weighted sums of ``products`` [T * K, D], or add them to it."""
    rows, top = ids.shape
    features = out.shape[1]
    block = min(1024, next_power_of_2(features))
    launch(combine_kernel, (rows, cdiv(features, block)))(
        products,
        weights,
        ids,
        out,
        out.stride(0),
        features,
        EXPERTS=experts,
        TOP=top,
        ADD=add,
        BLOCK=block,
        num_warps=4,
        **launch_options(),
    )


@triton.jit
def combine_kernel(
    products_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    out_stride,
    features,
    EXPERTS: tl.constexpr,
    TOP: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program sums BLOCK columns of a row, always in the order of its experts."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    depend(EARLY)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for each in tl.static_range(TOP):
        slot = row * TOP + each
        expert = tl.load(ids_ptr + slot)
        if (expert >= 0) & (expert < EXPERTS):  # what nobody has computed is not written
            product = tl.load(products_ptr + slot * features + column, mask=inside, other=0.0)
            total += product.to(tl.float32) * tl.load(weights_ptr + slot)
    kind = out_ptr.dtype.element_ty
    target = out_ptr + row * out_stride + column
    if ADD:
        total = total.to(kind).to(tl.float32) + tl.load(target, mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(target, total.to(kind), mask=inside)
