# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of few rows with a weight of four bits in Triton, on the matrix units, with the
activation or sum behind them.

As :mod:`reprise.ops.linear.few_rows_kernel` has it for plain weights. A product of tiles spans at
most a group of inputs, whose scale its sums are multiplied by. Numbers go to the matrix units as
``128 + number`` (1024 in float16), since that is made with few operations, and the sums of ``x``
make good for what is too much.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.linear.tile_end import finish, summed
from reprise.ops.triton_util import (
    INTERPRETED,
    arrivals,
    cdiv,
    ended,
    launch,
    launch_options,
    let_next_start,
    limits,
)
from reprise.ops.w4_linear.accepts import STEP
from reprise.ops.w4_linear.unpack import unpacked_above

MOST_ROWS = 16
_BLOCK_N = 64
_TOGETHER = 4
"""Products of tiles whose words are loaded at a time."""
_PROGRAMS = 4
"""To aim at, on a multiprocessor."""


@functools.cache
def _splits(outputs: int, steps: int, device: torch.device) -> int:
    """Programs that share a tile."""
    most = max(1, _PROGRAMS * limits(device).multiprocessors // cdiv(outputs, _BLOCK_N))
    return max(n for n in range(1, steps + 1) if steps % n == 0 and n <= most)


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
) -> None:
    """Write the product to ``out``, or add it if ``add``.

    Args:
        x: [T, K] of at most :data:`MOST_ROWS` rows, in two bytes; its elements side by side.
        packed: As the reference has it, like the other tensors.
        scales: The same.
        zeros: The same.
        bias: The same.
        out: [T, N].
        group: Inputs that share a scale, see :func:`accepts`.
        add: Keep what ``out`` holds and add to it.
        gated: ``packed`` has 2*N rows, gates first; write ``silu(gate) * up``.
    """
    rows, inputs = x.shape
    step = min(STEP, group)
    together = _TOGETHER
    while inputs // step % together:
        together //= 2
    splits = _splits(len(packed), inputs // step // together, x.device)
    tiles, padded = cdiv(len(packed), _BLOCK_N), 8 if rows <= 8 else MOST_ROWS
    partial = scales
    if splits > 1:
        partial = x.new_empty((splits, tiles * padded * _BLOCK_N), dtype=torch.float32)
    launch(w4_few_rows_kernel, (tiles * splits,))(
        x,
        packed,
        scales,
        zeros,
        bias,
        out,
        partial,
        arrivals(tiles, x.device),
        rows,
        out.shape[1],
        x.stride(0),
        out.stride(0),
        INPUTS=inputs,
        GROUP=group,
        ADD=add,
        GATED=gated,
        SPLITS=splits,
        WIDEN=INTERPRETED,
        ROWS=padded,
        BLOCK_N=_BLOCK_N,
        STEP=step,
        TOGETHER=together,
        num_warps=4,
        num_stages=3,
        **launch_options(),
    )


@triton.jit
def _multiply(acc, word, scale, middle, x, WIDEN: tl.constexpr):
    """acc + ((numbers - middle) @ x) * scale."""
    above: tl.constexpr = 128.0 if x.dtype == tl.bfloat16 else 1024.0
    number = unpacked_above(word, x.dtype)
    wide = x.to(tl.float32)
    product = tl.dot(number.to(tl.float32), wide) if WIDEN else tl.dot(number, x)
    excess = (above + middle)[:, None] * tl.sum(wide, axis=0)[None, :]
    return acc + (product - excess) * scale[:, None]


@triton.jit
def _weight(packed_ptr, scales_ptr, zeros_ptr, group, real, BLOCK_N: tl.constexpr):
    """Words, scale and zero of one step."""
    word = tl.load(packed_ptr, mask=real, other=0, eviction_policy="evict_first")
    middle = tl.full([BLOCK_N], 8.0, dtype=tl.float32)
    if zeros_ptr is not None:
        middle = tl.load(zeros_ptr + group).to(tl.float32)
    return word, tl.load(scales_ptr + group).to(tl.float32), middle


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
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one share of the inputs into a tile of ``out``.

    x: [rows, INPUTS]; packed: [features, INPUTS / 8], twice as many rows if GATED; scales, zeros:
    as many rows, a column for each GROUP inputs; out: [rows, features]; partial: [SPLITS, tiles,
    BLOCK_N, ROWS] float32; arrivals: [tiles], how many programs are done with a tile.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row = tl.arange(0, ROWS)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    feature = tile * WIDTH + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    SHARE: tl.constexpr = INPUTS // SPLITS
    WORDS: tl.constexpr = STEP // 8
    real = (feature < features)[:, None]
    real_row = (row < rows)[None, :]
    word = split * (SHARE // 8) + tl.arange(0, WORDS)
    packed_ptr += n.to(tl.int64)[:, None] * (INPUTS // 8) + word[None, :]
    # Reads of scales need no mask: whoever is not there has another's.
    some_n = tl.minimum(n, features * (BLOCK_N // WIDTH) - 1).to(tl.int64)
    scales_ptr += some_n * (INPUTS // GROUP)
    if zeros_ptr is not None:
        zeros_ptr += some_n * (INPUTS // GROUP)
    x_ptr += row.to(tl.int64)[None, :] * x_stride + tl.arange(0, STEP)[:, None]
    let_next_start(EARLY)

    acc = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    for start in range(0, SHARE, STEP * TOGETHER):
        k = split * SHARE + start
        words_ptr = packed_ptr + start // 8
        group = k // GROUP
        word_0, scale_0, middle_0 = _weight(words_ptr, scales_ptr, zeros_ptr, group, real, BLOCK_N)
        if TOGETHER > 1:
            group = (k + STEP) // GROUP
            word_1, scale_1, middle_1 = _weight(
                words_ptr + WORDS, scales_ptr, zeros_ptr, group, real, BLOCK_N
            )
        if TOGETHER > 2:
            group = (k + 2 * STEP) // GROUP
            word_2, scale_2, middle_2 = _weight(
                words_ptr + 2 * WORDS, scales_ptr, zeros_ptr, group, real, BLOCK_N
            )
            group = (k + 3 * STEP) // GROUP
            word_3, scale_3, middle_3 = _weight(
                words_ptr + 3 * WORDS, scales_ptr, zeros_ptr, group, real, BLOCK_N
            )
        x_0 = tl.zeros([STEP, ROWS], dtype=x_ptr.dtype.element_ty)
        x_1, x_2, x_3 = x_0, x_0, x_0
        # Within the condition, x is loaded when it is needed; weights are, ahead of that.
        if ended(EARLY):
            x_0 = tl.load(x_ptr + k, mask=real_row, other=0.0)
            if TOGETHER > 1:
                x_1 = tl.load(x_ptr + k + STEP, mask=real_row, other=0.0)
            if TOGETHER > 2:
                x_2 = tl.load(x_ptr + k + 2 * STEP, mask=real_row, other=0.0)
                x_3 = tl.load(x_ptr + k + 3 * STEP, mask=real_row, other=0.0)
        acc = _multiply(acc, word_0, scale_0, middle_0, x_0, WIDEN)
        if TOGETHER > 1:
            acc = _multiply(acc, word_1, scale_1, middle_1, x_1, WIDEN)
        if TOGETHER > 2:
            acc = _multiply(acc, word_2, scale_2, middle_2, x_2, WIDEN)
            acc = _multiply(acc, word_3, scale_3, middle_3, x_3, WIDEN)
    acc, last = summed(acc, partial_ptr, arrivals_ptr, tile, split, SPLITS)
    if last:
        finish(acc, bias_ptr, out_ptr, tile * WIDTH, features, row, rows, out_stride, GATED, ADD)
