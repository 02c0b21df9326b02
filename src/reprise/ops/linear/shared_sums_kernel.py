# mypy: allow-untyped-defs, no-check-untyped-defs
"""Matrix products in Triton whose bits of a row depend on that row alone.

One size of tile, and with it one instruction of the matrix units, for any number of rows. The
inputs are taken in as many parts as the weight's shape asks for; each part is summed from zero, and
the parts are added in their order. Whether one program does so after another, or several programs
at once of which the last one adds, is decided by the number of rows and changes no bit: few tiles
do not occupy a device, and of many the parts would be much to write and read again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.linear.tile_end import finish, summed
from reprise.ops.triton_util import (
    APART,
    INTERPRETED,
    arrivals,
    cdiv,
    depend,
    dot,
    launch,
    launch_options,
    limits,
)


@dataclass(frozen=True)
class Config:
    """Sizes of all launches for weights of one dtype."""

    block_n: int
    """Rows of the weight that a tile takes; with an activation one half are gates."""
    rows: int
    """Of ``x`` in a tile."""
    block_k: int
    """Inputs of one step of the inner loop."""
    num_stages: int
    """At most: fewer where shared memory holds fewer tiles of both operands."""
    num_warps: int


_CONFIG = Config(128, 64, 64, 4, 4)
_WIDE = Config(64, 16, 32, 3, 4)
"""For float32, which the matrix units do not take."""
_LEAST_STEPS = 4
"""Of a part. A compiler may add the product of a single step to the sum of the parts before it."""


def config_of(x: Tensor) -> Config:
    return _WIDE if x.dtype is torch.float32 else _CONFIG


@functools.cache
def parts_of(outputs: int, inputs: int, config: Config, multiprocessors: int) -> int:
    """Parts of the inputs: as many as let one tile of rows occupy the device."""
    steps = cdiv(inputs, config.block_k)
    most = min(multiprocessors // cdiv(outputs, config.block_n), steps // _LEAST_STEPS)
    return max((n for n in range(1, most + 1) if steps % n == 0), default=1)


def launch_product(
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
        x: [T, K].
        weight: [N, K].
        bias: [N], or None.
        out: [T, N], whose columns adjoin.
        add: Keep what ``out`` holds and add to it.
        gated: ``weight`` has 2*N rows and ``bias`` as many elements, gates first; write
            ``silu(gate) * up``.
    """
    rows, inputs = x.shape
    if rows == 0:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    weight = weight.contiguous()
    config, device = config_of(x), limits(x.device)
    parts = parts_of(weight.shape[0], inputs, config, device.multiprocessors)
    tiles = cdiv(rows, config.rows) * cdiv(weight.shape[0], config.block_n)
    shared = parts > 1 and tiles <= device.multiprocessors
    splits = parts if shared else 1
    partial = out
    if shared:
        size = tiles * config.block_n * config.rows
        partial = x.new_empty((parts, size), dtype=torch.float32)
    stage = (config.block_n + config.rows) * config.block_k * x.element_size()
    launch(shared_sums_kernel, (tiles * splits,))(
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
        PARTS=parts,
        SHARED=shared,
        WIDEN=INTERPRETED,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=max(1, min(config.num_stages, device.shared_memory // stage)),
        **APART,
        **launch_options(),
    )


@triton.jit(do_not_specialize=["rows"])
def shared_sums_kernel(
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
    PARTS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one part of the inputs into a tile of ``out``, or all PARTS.

    x: [rows, INPUTS]; weight: [features, INPUTS], twice as many rows if GATED; out: [rows,
    features]; partial: [PARTS, tiles, BLOCK_N, ROWS] float32; arrivals: [tiles], how many programs
    are done with a tile.
    """
    SPLITS: tl.constexpr = PARTS if SHARED else 1
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row_tiles = tl.cdiv(rows, ROWS)
    # Programs next to each other read the same rows of the weight.
    row = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    feature = tile // row_tiles * WIDTH + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    STEPS: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = STEPS // PARTS * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    real_row = (row < rows)[None, :]
    real_feature = (feature < features)[:, None]
    x_ptr += row.to(tl.int64)[None, :] * x_stride + k[:, None]
    weight_ptr += n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    depend(EARLY)

    total = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    for part in range(split, split + PARTS // SPLITS):
        acc = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
        for start in range(part * SHARE, part * SHARE + SHARE, BLOCK_K):
            if INPUTS % BLOCK_K == 0:
                weight = tl.load(weight_ptr + start, mask=real_feature, other=0.0)
                x = tl.load(x_ptr + start, mask=real_row, other=0.0)
            else:
                some = start + k < INPUTS
                weight = tl.load(weight_ptr + start, mask=real_feature & some[None, :], other=0.0)
                x = tl.load(x_ptr + start, mask=real_row & some[:, None], other=0.0)
            acc = dot(weight, x, acc, WIDEN)
        total += acc
    total, last = summed(total, partial_ptr, arrivals_ptr, tile, split, SPLITS)
    if last:
        first = tile // row_tiles * WIDTH
        finish(total, bias_ptr, out_ptr, first, features, row, rows, out_stride, GATED, ADD)
