# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of groups of rows, each with its expert's weight, both of eight bits, in Triton.

As :mod:`reprise.ops.experts.grouped_kernel` has it for plain weights, and
:mod:`reprise.ops.fp8_linear.product_kernel` for one product: where the device does not multiply
numbers of eight bits, both are multiplied in the compute dtype, which holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.experts.groups import Groups
from reprise.ops.experts.tile import finish, tile_of
from reprise.ops.fp8_experts.accepts import STEP
from reprise.ops.fp8_linear.product_kernel import from_bits
from reprise.ops.triton_util import INTERPRETED, cdiv, depend, launch, launch_options, limits


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    block_m: int
    """Rows of a tile."""
    block_n: int
    """Rows of the weight that a tile takes; with an activation one half are gates."""
    num_stages: int
    """At most: fewer where shared memory holds fewer tiles of both operands."""
    num_warps: int
    swap: bool = False
    """The weight is the left operand: the matrix units of Hopper take 64 rows of that and as few
    of the other as there are."""


def launch_grouped(
    numbers: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    groups: Groups,
    out: Tensor,
    config: Config,
    block_n: int,
    *,
    top: int,
    gated: bool,
    limit: float = 0.0,
) -> None:
    """Multiply each group's rows with its expert's weight.

    Args:
        numbers: Of :func:`reprise.ops.fp8_linear.quantise_kernel.quantise`. With ``gated`` [T, K],
            read by the row of each slot; else [T * top, K] in the order of groups.
        scales: [K / 128 or 1, rows of numbers], of the same.
        weight: [E, N, K] float8_e4m3fn, contiguous; with ``gated`` [E, 2 * N, K], the rows of the
            gate first.
        weight_scale: [E, ceil(rows / block_n), K / 128 or 1] float32.
        groups: Of the rows, in tiles of ``config.block_m``.
        out: [T * top, N] in the compute dtype: with ``gated`` in the order of groups, what the
            activation gives; else by slot.
        config: Sizes.
        block_n: Rows of the weight that share a scale.
        top: Slots of a row.
        gated: This is the first of both products.
        limit: What gates and ups are clamped to; 0: they are not.
    """
    features = out.shape[1]
    native = numbers.dtype is weight.dtype
    columns = cdiv(features, config.block_n // 2 if gated else config.block_n)
    # Eight bits that are made numbers have a place beside those that arrive.
    made = 0 if native else config.block_n * STEP * numbers.element_size()
    stage = (config.block_m * numbers.element_size() + config.block_n) * STEP
    stages = max(1, min(config.num_stages, (limits(out.device).shared_memory - made) // stage))
    launch(fp8_grouped_kernel, (groups.most * columns,))(
        numbers,
        scales,
        weight if native else weight.view(torch.uint8),
        weight_scale,
        groups.slots,
        groups.tiles,
        groups.count,
        out,
        features,
        len(numbers),
        groups.most,
        limit,
        INPUTS=weight.shape[2],
        ROWS_OF_SCALE=block_n,
        SCALES=weight_scale.shape[1],
        WHOLE=len(scales) == 1,
        TOP=top,
        GATED=gated,
        CLAMPS=limit != 0,
        SWAP=config.swap,
        WIDEN=INTERPRETED,
        NATIVE=native,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STEP=STEP,
        num_warps=config.num_warps,
        num_stages=stages,
        **launch_options(),
    )


@triton.jit(do_not_specialize=["rows", "most", "limit"])
def fp8_grouped_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    slots_ptr,
    tiles_ptr,
    count_ptr,
    out_ptr,
    features,
    rows,
    most,
    limit,
    INPUTS: tl.constexpr,
    ROWS_OF_SCALE: tl.constexpr,
    SCALES: tl.constexpr,
    WHOLE: tl.constexpr,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    CLAMPS: tl.constexpr,
    SWAP: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_M rows of ``out`` by BLOCK_N, or half as many, of its columns.

    WHOLE: there is one scale for all inputs.
    """
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    columns = tl.cdiv(features, WIDTH)
    tile = tl.program_id(0) // columns
    column = tl.program_id(0) % columns * WIDTH
    feature = column + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    k = tl.arange(0, STEP)
    inside = (feature < features)[:, None]
    GROUPS: tl.constexpr = 1 if WHOLE else INPUTS // STEP
    # Reads of scales need no mask: whoever is not there has another's.
    block = tl.minimum(n, features * (BLOCK_N // WIDTH) - 1) // ROWS_OF_SCALE
    depend(EARLY)
    if tile < tl.load(count_ptr):
        expert, place, real, slot = tile_of(slots_ptr, tiles_ptr, tile, most, BLOCK_M)
        row = slot // TOP if GATED else place
        x_tile = x_ptr + row.to(tl.int64)[:, None] * INPUTS + k[None, :]
        all_rows = features.to(tl.int64) * (BLOCK_N // WIDTH)
        weight_tile = weight_ptr + (expert * all_rows + n)[:, None] * INPUTS + k[None, :]
        scale_row = scale_ptr + (expert * SCALES + block) * GROUPS
        if SWAP:
            acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        else:
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, INPUTS, STEP):
            group = 0 if WHOLE else start // STEP
            weight = tl.load(weight_tile + start, mask=inside, other=0.0)
            x = tl.load(x_tile + start, mask=real[:, None], other=0.0)
            scale = tl.load(scale_row + group)
            x_group = x_scale_ptr + tl.cast(group, tl.int64) * rows
            x_scale = tl.load(x_group + row, mask=real, other=0.0)
            if not NATIVE:
                weight = from_bits(weight, x.dtype)
                if WIDEN:
                    weight = weight.to(tl.float32)
                    x = x.to(tl.float32)
            # A sum of its own for each step: matrix units add numbers of eight bits with fewer
            # bits than float32 has.
            if SWAP:
                acc += tl.dot(weight, x.T) * (scale[:, None] * x_scale[None, :])
            else:
                acc += tl.dot(x, weight.T) * (x_scale[:, None] * scale[None, :])
        finish(acc, out_ptr, place, slot, real, column, features, limit, GATED, SWAP, CLAMPS)
