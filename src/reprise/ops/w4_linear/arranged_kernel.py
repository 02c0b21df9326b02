# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of a few dozen rows with a weight of four bits in Triton, on the matrix units, with the
activation or sum behind them.

The weight is their first operand, and words become operands where they lie in registers: a word
holds four pairs of neighbouring inputs, and a pair under a mask is two numbers of float16, the
smallest that it has. So inputs are multiplied in the order in which pairs come out of words, and
:mod:`reprise.ops.w4_linear.arrange_kernel` puts those of ``x`` in that order. It gives their sums,
too, which make good for what stands for zero, and what each step's product is multiplied by.

As in :mod:`reprise.ops.linear.few_rows_kernel` weights are asked for before the kernel before has
ended, and programs that share a tile sum in one order.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

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
    limits,
    shares,
)
from reprise.ops.w4_linear.accepts import STEP


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    rows: int
    """Of ``x`` in a tile."""
    block_n: int
    """Rows of the weight in a tile; with an activation one half are gates."""
    together: int
    """Steps of the inner loop that are loaded at a time."""
    num_stages: int
    num_warps: int
    programs: float
    """To aim at, on a multiprocessor."""
    fetched: int = 128
    """Words of each row of the weight that are fetched before the kernel before has ended."""
    splits: int = 1
    """Programs that share a tile."""


_CONFIGS = (Config(32, 64, 1, 6, 4, 2), Config(64, 64, 1, 5, 4, 2))
MOST_ROWS = _CONFIGS[-1].rows


def step_of(group: int) -> int:
    """Inputs that are multiplied together, which share a scale."""
    return min(STEP, group)


@functools.cache
def _config_of(rows: int, outputs: int, inputs: int, step: int, device: torch.device) -> Config:
    config = next(each for each in _CONFIGS if rows <= each.rows)
    return fitted(config, outputs, inputs, step, device)


def fitted(config: Config, outputs: int, inputs: int, step: int, device: torch.device) -> Config:
    """``config`` for a product on a device."""
    together = math.gcd(inputs // step, config.together)
    tiles, steps = cdiv(outputs, config.block_n), inputs // step // together
    splits = shares(tiles, steps, config.programs, device)
    stage = (config.block_n // 2 + 2 * config.rows) * step * together
    stages = max(1, min(config.num_stages, limits(device).shared_memory // stage))
    return replace(config, together=together, num_stages=stages, splits=splits)


def launch_arranged(
    x: Tensor, sums: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None,
    bias: Tensor | None, out: Tensor, group: int, *, add: bool = False,
    gated: bool = False, config: Config | None = None,
) -> None:  # fmt: skip
    """Write the product to ``out``, or add it if ``add``.

    Args:
        x: [T, K] of :func:`arrange`, with the steps of :func:`step_of`.
        sums: [2, K / step, T], of the same.
        packed: As the reference has it, like the other tensors.
        scales: The same.
        zeros: The same.
        bias: The same.
        out: [T, N].
        group: Inputs that share a scale.
        add: Keep what ``out`` holds and add to it.
        gated: ``packed`` has 2*N rows, gates first; write ``silu(gate) * up``.
        config: Sizes; None: those that suit the product.
    """
    rows, inputs = x.shape
    step = step_of(group)
    config = config or _config_of(rows, len(packed), inputs, step, x.device)
    tiles = cdiv(rows, config.rows) * cdiv(len(packed), config.block_n)
    partial = scales
    if config.splits > 1:
        size = tiles * config.rows * config.block_n
        partial = x.new_empty((config.splits, size), dtype=torch.float32)
    launch(w4_arranged_kernel, (tiles * config.splits,))(
        x,
        sums,
        packed,
        scales,
        zeros,
        bias,
        out,
        partial,
        arrivals(tiles, x.device),
        rows,
        out.shape[1],
        out.stride(0),
        INPUTS=inputs,
        GROUP=group,
        ADD=add,
        GATED=gated,
        SPLITS=config.splits,
        WIDEN=INTERPRETED,
        FETCHED=config.fetched,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        TOGETHER=config.together,
        STEP=step,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
    )


@triton.jit
def _halves(words):
    """The two halves of words, behind one another in a new last dimension, as float16."""
    low, high = (words & 0xFFFF).to(tl.int16), ((words >> 16) & 0xFFFF).to(tl.int16)
    return tl.join(low, high).to(tl.float16, bitcast=True)


@triton.jit
def _numbers(words):
    """[N, W] words as [N, 8 * W] numbers: all first pairs, then all second ones, third, fourth. Of
    2 ** -24 in first and third pairs, of 2 ** -20 in the others."""
    first = _halves(words & 0x000F000F)
    second = _halves(words & 0x00F000F0)
    third = _halves((words >> 8) & 0x000F000F)
    fourth = _halves((words >> 8) & 0x00F000F0)
    # Registers behind one another: nothing is exchanged.
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    pairs = tl.permute(pairs, [0, 3, 4, 1, 2])
    return tl.reshape(pairs, [words.shape[0], 8 * words.shape[1]])


@triton.jit(do_not_specialize=["rows"])
def w4_arranged_kernel(
    x_ptr,
    sums_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    features,
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
    TOGETHER: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one share of the inputs into a tile of ``out``.

    x: [rows, INPUTS], arranged; sums: [2, INPUTS / STEP, rows] float32, sums and factors; packed:
    [features, INPUTS / 8], twice as many rows if GATED; scales, zeros: as many rows, a column for
    each GROUP inputs; out: [rows, features]; partial: [SPLITS, tiles, BLOCK_N, ROWS] float32;
    arrivals: [tiles], how many programs are done with a tile.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row_tiles = tl.cdiv(rows, ROWS)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    row = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    feature = tile // row_tiles * WIDTH + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    WORDS: tl.constexpr = STEP // 8
    SHARE: tl.constexpr = INPUTS // SPLITS
    begin = split * SHARE
    real = (feature < features)[:, None]
    real_row = (row < rows)[None, :]
    # Reads of scales need no mask: whoever is not there has another's.
    some_n = tl.minimum(n, features * (BLOCK_N // WIDTH) - 1).to(tl.int64)
    some_row = tl.minimum(row, rows - 1)
    word = tl.arange(0, WORDS)
    first_ptr = packed_ptr + some_n[:, None] * (INPUTS // 8) + begin // 8
    scales_ptr += some_n * (INPUTS // GROUP)
    if zeros_ptr is not None:
        zeros_ptr += some_n * (INPUTS // GROUP)
    packed_ptr += n.to(tl.int64)[:, None] * (INPUTS // 8) + begin // 8 + word[None, :]
    x_ptr += row.to(tl.int64)[None, :] * INPUTS + begin + tl.arange(0, STEP)[:, None]
    sums_ptr += some_row
    fetch(scales_ptr + begin // GROUP, EARLY)
    if zeros_ptr is not None:
        fetch(zeros_ptr + begin // GROUP, EARLY)
    line = tl.arange(0, FETCHED // 32)[None, :] * 32 % (SHARE // 8)  # of 128 bytes
    fetch(first_ptr + line, EARLY)
    depend(EARLY)

    acc = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    for start in range(0, SHARE, STEP * TOGETHER):
        for which in tl.static_range(TOGETHER):
            k = start + which * STEP
            words = tl.load(packed_ptr + k // 8, mask=real, other=0, eviction_policy="evict_first")
            x = tl.load(x_ptr + k, mask=real_row, other=0.0)
            step = (begin + k) // STEP
            sums = tl.load(sums_ptr + step * rows)
            factor = tl.load(sums_ptr + (INPUTS // STEP + step) * rows)
            group = (begin + k) // GROUP
            scale = tl.load(scales_ptr + group).to(tl.float32)
            middle = tl.full([BLOCK_N], 8.0, dtype=tl.float32)
            if zeros_ptr is not None:
                middle = tl.load(zeros_ptr + group).to(tl.float32)
            product = dot(_numbers(words), x, tl.zeros(acc.shape, dtype=tl.float32), WIDEN)
            product -= middle[:, None] * sums[None, :]
            acc += product * (scale[:, None] * factor[None, :])
    acc, last = summed(acc, partial_ptr, arrivals_ptr, tile, split, SPLITS)
    if last:
        first = tile // row_tiles * WIDTH
        finish(acc, bias_ptr, out_ptr, first, features, row, rows, out_stride, GATED, ADD)
