# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of groups of inputs with a weight of each group in Triton, one group or several.

As in :mod:`reprise.ops.linear.few_rows_kernel` the weight is the matrix units' first operand, and
programs that share a tile each take a part of its inputs, which the last of them sums in one order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.linear.tile_end import summed
from reprise.ops.triton_util import (
    INTERPRETED,
    arrivals,
    cdiv,
    depend,
    dot,
    fetch,
    launch,
    launch_options,
    limits,
    next_power_of_2,
    shares,
)


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    rows: int
    """Of ``x`` in a tile."""
    block_n: int
    """Rows of the weight in a tile."""
    block_k: int
    """Inputs of one step of the inner loop."""
    num_stages: int
    """At most: fewer where shared memory holds fewer tiles of both operands."""
    num_warps: int
    programs: float
    """To aim at, on a multiprocessor."""
    splits: int = 1
    """Programs that share a tile."""


_CONFIGS = (
    Config(16, 64, 256, 3, 4, 2),
    Config(64, 64, 128, 4, 4, 1.5),
    Config(128, 128, 64, 4, 8, 0),
)
_WIDE = Config(16, 64, 64, 2, 4, 2)
"""For float32, which the matrix units do not take."""
_FETCHED = 256
"""Inputs of each row of the weight that are fetched early."""


@functools.cache
def config_of(
    rows: int, groups: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """Sizes for a product of so many groups, each of so many outputs and inputs."""
    config = next((each for each in _CONFIGS if rows <= each.rows), _CONFIGS[-1])
    if dtype is torch.float32:
        config = _WIDE
    block_k = min(config.block_k, max(16, next_power_of_2(inputs)))
    # What is left over behind whole steps goes to no share of its own.
    steps = inputs // block_k if inputs % block_k == 0 else 1
    tiles = groups * cdiv(rows, config.rows) * cdiv(outputs, config.block_n)
    splits = shares(tiles, steps, config.programs, device)
    stage = (config.block_n + config.rows) * block_k * dtype.itemsize
    stages = max(1, min(config.num_stages, limits(device).shared_memory // stage))
    return replace(config, block_k=block_k, num_stages=stages, splits=splits)


def launch_groups(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write the product of each group.

    Args:
        x: [T, G, K], its elements side by side.
        weight: [G * N, K], contiguous.
        out: [T, G * N], contiguous; of any type.
    """
    rows, groups, inputs = x.shape
    outputs = len(weight) // groups
    config = config_of(rows, groups, outputs, inputs, x.dtype, x.device)
    tiles = groups * cdiv(rows, config.rows) * cdiv(outputs, config.block_n)
    partial = out
    if config.splits > 1:
        size = tiles * config.rows * config.block_n
        partial = x.new_empty((config.splits, size), dtype=torch.float32)
    launch(group_product_kernel, (tiles * config.splits,))(
        x,
        weight,
        out,
        partial,
        arrivals(tiles, x.device),
        rows,
        x.stride(0),
        x.stride(1),
        GROUPS=groups,
        OUTPUTS=outputs,
        INPUTS=inputs,
        SPLITS=config.splits,
        WIDEN=INTERPRETED,
        FETCHED=_FETCHED,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
    )


@triton.jit(do_not_specialize=["rows"])
def group_product_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    x_stride,
    group_stride,
    GROUPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
    FETCHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one share of a group's inputs into a tile of its outputs.

    partial: [SPLITS, tiles, BLOCK_N, ROWS] float32; arrivals: [tiles], how many programs are done
    with a tile.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row_tiles = tl.cdiv(rows, ROWS)
    # Programs next to each other read the same rows of the weight.
    row = (tile % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    TILES: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    group = (tile // row_tiles // TILES).to(tl.int64)
    output = tile // row_tiles % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    SHARE: tl.constexpr = INPUTS // SPLITS
    k = split * SHARE + tl.arange(0, BLOCK_K)
    real_row = (row < rows)[None, :]
    real_output = (output < OUTPUTS)[:, None]
    x_tile = x_ptr + row[None, :] * x_stride + group * group_stride + k[:, None]
    first = weight_ptr + (group * OUTPUTS + tl.minimum(output, OUTPUTS - 1))[:, None] * INPUTS
    line = tl.arange(0, FETCHED // 64)[None, :] * 64 % SHARE  # of 128 bytes
    fetch(first + split * SHARE + line, EARLY)
    weight_tile = weight_ptr + (group * OUTPUTS + output)[:, None] * INPUTS + k[None, :]
    depend(EARLY)

    acc = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        if INPUTS % BLOCK_K == 0:
            weight = tl.load(
                weight_tile + start, mask=real_output, other=0.0, eviction_policy="evict_first"
            )
            x = tl.load(x_tile + start, mask=real_row, other=0.0)
        else:
            some = start + k < INPUTS
            weight = tl.load(weight_tile + start, mask=real_output & some[None, :], other=0.0)
            x = tl.load(x_tile + start, mask=real_row & some[:, None], other=0.0)
        acc = dot(weight, x, acc, WIDEN)
    acc, last = summed(acc, partial_ptr, arrivals_ptr, tile, split, SPLITS)
    if last:
        column = group * OUTPUTS + output
        target = out_ptr + row[None, :] * (GROUPS * OUTPUTS) + column[:, None]
        tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=real_row & real_output)
