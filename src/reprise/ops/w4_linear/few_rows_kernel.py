# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of few rows with a weight of four bits in Triton, on the matrix units, with the
activation or sum behind them.

The weight is their first operand, and words become operands where they lie in registers: a word
holds four pairs of neighbouring inputs, and a pair is two operations away from being two numbers as
the matrix units take them. So there are four products for each tile of words, of every fourth pair
of inputs each. Numbers are ``128 + number`` (1024 in float16) there, and the sums of ``x``, which
come from a product with ones, make good for what is too much.

Programs that share a tile sum as those of :mod:`reprise.ops.linear.few_rows_kernel`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.linear.tile_end import finish, summed
from reprise.ops.triton_util import (
    INTERPRETED,
    arrivals,
    cdiv,
    depend,
    dot,
    fetch,
    launch,
    launch_options,
    shares,
)
from reprise.ops.w4_linear.accepts import STEP


class Config(NamedTuple):
    """Sizes of one launch."""

    rows: int
    """Of ``x`` in a tile."""
    block_n: int
    """Rows of the weight in a tile; with an activation one half are gates."""
    num_warps: int
    together: int
    """Groups of inputs that are loaded at a time."""
    num_stages: int
    programs: int
    """To aim at, on a multiprocessor."""
    fetched: int
    """Words of each row of the weight that are fetched before the kernel before has ended."""


CONFIGS = (Config(8, 64, 4, 2, 3, 6, 64), Config(16, 32, 2, 2, 3, 5, 128))
LEAST_GROUP = 64
"""Of which the matrix units take two numbers of each word."""
MOST_ROWS = CONFIGS[-1].rows


@functools.cache
def splits_of(outputs: int, steps: int, config: Config, device: torch.device) -> int:
    """Programs that share a tile."""
    return shares(cdiv(outputs, config.block_n), steps, config.programs, device)


def launch_few_rows(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    group: int,
    *,
    add: bool = False,
    gated: bool = False,
    config: Config | None = None,
) -> None:
    """Write the product to ``out``, or add it if ``add``.

    Args:
        x: [T, K] of at most :data:`MOST_ROWS` rows, in two bytes; its elements side by side, and
            each row a multiple of four bytes behind the one before.
        packed: As the reference has it, like the other tensors.
        scales: The same.
        zeros: The same.
        bias: The same.
        out: [T, N].
        group: Inputs that share a scale, at least :data:`LEAST_GROUP`, see :func:`accepts`.
        add: Keep what ``out`` holds and add to it.
        gated: ``packed`` has 2*N rows, gates first; write ``silu(gate) * up``.
        config: Sizes.
    """
    rows, inputs = x.shape
    config = config or next(each for each in CONFIGS if rows <= each.rows)
    step = min(STEP, group)
    together = math.gcd(inputs // step, config.together)
    splits = splits_of(len(packed), inputs // step // together, config, x.device)
    tiles = cdiv(len(packed), config.block_n)
    partial = scales
    if splits > 1:
        size = tiles * config.rows * config.block_n
        partial = x.new_empty((splits, size), dtype=torch.float32)
    launch(w4_few_rows_kernel, (tiles * splits,))(
        x.view(torch.int32),
        packed,
        scales,
        zeros,
        bias,
        out,
        partial,
        arrivals(tiles, x.device),
        rows,
        out.shape[1],
        x.stride(0) // 2,
        out.stride(0),
        INPUTS=inputs,
        GROUP=group,
        ADD=add,
        GATED=gated,
        SPLITS=splits,
        WIDEN=INTERPRETED,
        FETCHED=config.fetched,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        STEP=step,
        TOGETHER=together,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
    )


@triton.jit
def _halves(words, kind: tl.constexpr):
    """The two halves of words, behind one another in a new last dimension."""
    low, high = (words & 0xFFFF).to(tl.int16), ((words >> 16) & 0xFFFF).to(tl.int16)
    return tl.join(low, high).to(kind, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def w4_few_rows_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    features,
    x_stride,
    out_stride,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
    FETCHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one share of the inputs into a tile of ``out``.

    x: [rows, INPUTS / 2], words of two numbers; packed: [features, INPUTS / 8], twice as many rows
    if GATED; scales, zeros: as many rows, a column for each GROUP inputs; out: [rows, features];
    partial: [SPLITS, tiles, BLOCK_N, ROWS] float32; arrivals: [tiles], how many programs are done
    with a tile.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row = tl.arange(0, ROWS)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    feature = tile * WIDTH + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    SHARE: tl.constexpr = INPUTS // SPLITS
    WORDS: tl.constexpr = STEP // 8
    kind: tl.constexpr = scales_ptr.dtype.element_ty
    above: tl.constexpr = 128.0 if kind == tl.bfloat16 else 1024.0
    bits: tl.constexpr = 0x43004300 if kind == tl.bfloat16 else 0x64006400
    real = (feature < features)[:, None]
    real_row = (row < rows)[None, :]
    word = tl.arange(0, WORDS)
    # Reads of scales need no mask: whoever is not there has another's.
    some_n = tl.minimum(n, features * (BLOCK_N // WIDTH) - 1).to(tl.int64)
    first_word = split * (SHARE // 8)
    line = tl.arange(0, FETCHED // 32)[None, :] * 32 % (SHARE // 8)  # of 128 bytes
    fetch(packed_ptr + some_n[:, None] * (INPUTS // 8) + first_word + line, EARLY)
    scales_ptr += some_n * (INPUTS // GROUP)
    fetch(scales_ptr + split * SHARE // GROUP, EARLY)
    if zeros_ptr is not None:
        zeros_ptr += some_n * (INPUTS // GROUP)
    packed_ptr += n.to(tl.int64)[:, None] * (INPUTS // 8) + first_word + word[None, :]
    x_ptr += row.to(tl.int64)[None, :] * x_stride + split * (SHARE // 2) + word[:, None] * 4
    depend(EARLY)

    one = tl.full([BLOCK_N, 2 * WORDS], 1.0, dtype=kind)
    acc = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    for start in range(0, SHARE, STEP * TOGETHER):
        for which in tl.static_range(TOGETHER):
            k = start + which * STEP
            words = tl.load(packed_ptr + k // 8, mask=real, other=0, eviction_policy="evict_first")
            group = (split * SHARE + k) // GROUP
            scale = tl.load(scales_ptr + group).to(tl.float32)
            middle = tl.full([BLOCK_N], 8.0, dtype=tl.float32)
            if zeros_ptr is not None:
                middle = tl.load(zeros_ptr + group).to(tl.float32)
            product = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
            sums = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
            for pair in tl.static_range(4):
                x = _halves(tl.load(x_ptr + k // 2 + pair, mask=real_row, other=0), kind)
                x = tl.reshape(tl.permute(x, [0, 2, 1]), [2 * WORDS, ROWS])
                number = _halves(((words >> (4 * pair)) & 0x000F000F) | bits, kind)
                number = tl.reshape(number, [BLOCK_N, 2 * WORDS])
                product = dot(number, x, product, WIDEN)
                sums = dot(one, x, sums, WIDEN)
            acc += (product - (above + middle)[:, None] * sums) * scale[:, None]
    acc, last = summed(acc, partial_ptr, arrivals_ptr, tile, split, SPLITS)
    if last:
        finish(acc, bias_ptr, out_ptr, tile * WIDTH, features, row, rows, out_stride, GATED, ADD)
