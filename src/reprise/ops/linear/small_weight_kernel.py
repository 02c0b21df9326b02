# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of up to 128 rows with a small weight in Triton, on the matrix units, in one launch.

A small weight has too few tiles to occupy a device. The BLAS then shares out the inputs of a tile
to several programs and launches a second kernel that sums; here the last of these programs to end
sums, always in the same order, and adds the bias and what ``out`` holds, or computes the
activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import (
    INTERPRETED,
    arrivals,
    cdiv,
    depend,
    dot,
    is_last,
    launch,
    launch_options,
    limits,
    silu,
)


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    block_m: int = 64
    """Rows of a tile; with fewer the matrix units of Hopper cannot be used in full."""
    block_n: int = 32
    """Rows of the weight that a tile takes; with an activation one half are gates."""
    block_k: int = 128
    """Inputs of one step of the inner loop."""
    num_stages: int = 5
    """At most: fewer where shared memory holds fewer tiles of both operands."""
    num_warps: int = 4


_DEFAULT = Config()
_GATED = Config(block_n=64, num_stages=4)
_GATED_SHORT = Config(block_n=64, block_k=64, num_stages=8)
"""Where matrix units take their operands from registers, which the other needs too many of: on
devices of less shared memory than :data:`_SHARED_MEMORY` bytes."""
_SHARED_MEMORY = 192 << 10
_MOST_ROWS = 128
_MOST_WEIGHTS = 1 << 23
"""Elements of a weight beyond which the BLAS is as fast; so it is where tiles alone are more than
the device has multiprocessors."""


def supports_small_weight(x: Tensor, weight: Tensor, gated: bool = False) -> bool:
    """Whether :func:`launch_small_weight` computes this product, and as fast as the BLAS."""
    config = _config(x, gated)
    return (
        x.shape[0] <= _MOST_ROWS
        and x.dtype is not torch.float32
        and x.stride(1) == 1
        and weight.is_contiguous()
        and weight.shape[1] % config.block_k == 0
        and weight.numel() <= _MOST_WEIGHTS
        and _tiles(x, weight, config) <= limits(x.device).multiprocessors
        and _stages(config, x) > 0
    )


def _config(x: Tensor, gated: bool) -> Config:
    if not gated:
        return _DEFAULT
    return _GATED if limits(x.device).shared_memory >= _SHARED_MEMORY else _GATED_SHORT


def _stages(config: Config, x: Tensor) -> int:
    stage = (config.block_m + config.block_n) * config.block_k * x.element_size()
    return min(config.num_stages, limits(x.device).shared_memory // stage)


def _tiles(x: Tensor, weight: Tensor, config: Config) -> int:
    return cdiv(x.shape[0], config.block_m) * cdiv(weight.shape[0], config.block_n)


def launch_small_weight(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    add: bool = False,
    gated: bool = False,
) -> None:
    """Write ``x @ weight.T + bias`` to ``out``, or add it if ``add``.

    Args:
        x: [T, K], see :func:`supports_small_weight`.
        weight: [N, K].
        bias: [N], or None.
        out: [T, N].
        add: Keep what ``out`` holds and add to it.
        gated: ``weight`` has 2*N rows and ``bias`` as many elements, gates first; write
            ``silu(gate) * up``.
    """
    rows, inputs = x.shape
    config = _config(x, gated)
    tiles = _tiles(x, weight, config)
    # Programs that share a tile: as many as occupy the device.
    splits = 1
    steps, most = inputs // config.block_k, limits(x.device).multiprocessors // tiles
    while 2 * splits <= most and steps % (2 * splits) == 0:
        splits *= 2
    partial = out
    if splits > 1:
        size = tiles * config.block_m * config.block_n
        partial = x.new_empty((splits, size), dtype=torch.float32)
    launch(small_weight_kernel, (tiles * splits,))(
        x,
        weight,
        bias,
        out,
        partial,
        arrivals(tiles, x.device),
        rows,
        out.shape[1],
        x.stride(0),
        out.stride(0),
        INPUTS=inputs,
        ADD=add,
        GATED=gated,
        SPLITS=splits,
        WIDEN=INTERPRETED,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=_stages(config, x),
        **launch_options(),
    )


@triton.jit(do_not_specialize=["rows"])
def small_weight_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    features,
    x_stride,
    out_stride,
    INPUTS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one share of the inputs into a tile of ``out``.

    x: [rows, INPUTS]; weight: [features, INPUTS], twice as many rows if GATED; out: [rows,
    features]; partial: [SPLITS, tiles, BLOCK_M, BLOCK_N] float32; arrivals: [tiles], how many
    programs are done with a tile.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row_tiles = tl.cdiv(rows, BLOCK_M)
    # Programs next to each other read the same rows of the weight.
    row = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    feature = tile // row_tiles * WIDTH + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    SHARE: tl.constexpr = INPUTS // SPLITS
    k = split * SHARE + tl.arange(0, BLOCK_K)
    real_row = (row < rows)[:, None]
    real_feature = (feature < features)[None, :]
    x_ptr += row.to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_ptr += n.to(tl.int64)[None, :] * INPUTS + k[:, None]
    depend(EARLY)

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        x = tl.load(x_ptr + start, mask=real_row, other=0.0)
        weight = tl.load(weight_ptr + start, mask=real_feature, other=0.0)
        acc = dot(x, weight, acc, WIDEN)
    last = True
    if SPLITS > 1:
        within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        size = tl.num_programs(0) // SPLITS * (BLOCK_M * BLOCK_N)
        partial_ptr += tile * (BLOCK_M * BLOCK_N) + within
        tl.store(partial_ptr + split * size, acc)
        last = is_last(arrivals_ptr + tile, SPLITS)
    if last:
        if SPLITS > 1:
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for other in tl.static_range(SPLITS):
                # Just written: the nearest cache may hold older values.
                acc += tl.load(partial_ptr + other * size, cache_modifier=".cg")
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=feature < features, other=0.0).to(tl.float32)[None, :]
        kind = out_ptr.dtype.element_ty
        result = acc
        if GATED:
            pairs = tl.reshape(acc.to(kind).to(tl.float32), [BLOCK_M, 2, WIDTH])
            gate, up = tl.split(tl.permute(pairs, [0, 2, 1]))
            result = silu(gate, kind) * up
        column = tile // row_tiles * WIDTH + tl.arange(0, WIDTH)
        target = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
        real = real_row & (column < features)[None, :]
        if ADD:
            result += tl.load(target, mask=real, other=0.0).to(tl.float32)
        tl.store(target, result.to(kind), mask=real)
