# mypy: allow-untyped-defs, no-check-untyped-defs
"""How what splits of keys give becomes a tile's result, always in the splits' order."""

import triton
import triton.language as tl


@triton.jit
def merged(acc, row_sum, row_max, other, other_sum, other_max):
    """Two softmaxes over different keys as one; of one that has seen no key nothing is taken."""
    new_max = tl.maximum(row_max, other_max)
    # A row that has seen no key yet has the maximum -inf, and -inf + inf is NaN.
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    decay = tl.exp2(row_max - shift)
    other_decay = tl.exp2(other_max - shift)
    acc = acc * decay[:, None] + other * other_decay[:, None]
    return acc, row_sum * decay + other_sum * other_decay, new_max


@triton.jit
def _left(its, row, count, KEPT: tl.constexpr, BLOCK_D: tl.constexpr):
    """What a split gave rows below ``count``. It was just written: the nearest cache may hold older
    values."""
    channel = tl.arange(0, BLOCK_D)
    real = row < count
    acc = tl.load(
        its + row[:, None] * BLOCK_D + channel[None, :], mask=real[:, None], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip
    its += KEPT * BLOCK_D
    row_sum = tl.load(its + row, mask=real, other=0.0, cache_modifier=".cg")
    row_max = tl.load(its + KEPT + row, mask=real, other=-float("inf"), cache_modifier=".cg")
    return acc, row_sum, row_max


@triton.jit
def merge(
    partial_ptr, out_ptr, first_split, end_split, tokens, out_stride, out_head_stride,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, KEPT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the tile's rows of ``tokens`` tokens from what its splits gave, in their order; several
    are read at a time."""
    SIZE: tl.constexpr = KEPT * (BLOCK_D + 2)
    ROWS: tl.constexpr = 4 if KEPT <= 4 else 16
    channel = tl.arange(0, BLOCK_D)
    count = tl.minimum(KEPT, tokens * GROUP)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        total_sum = tl.zeros([ROWS], dtype=tl.float32)
        total_max = tl.full([ROWS], -float("inf"), dtype=tl.float32)
        for split in range(first_split, end_split, 4):
            its = partial_ptr + tl.cast(split, tl.int64) * SIZE
            acc_0, sum_0, max_0 = _left(its, row, count, KEPT, BLOCK_D)
            # Of one that is not there nothing is taken.
            more = tl.where(split + 1 < end_split, count, 0)
            acc_1, sum_1, max_1 = _left(its + SIZE, row, more, KEPT, BLOCK_D)
            more = tl.where(split + 2 < end_split, count, 0)
            acc_2, sum_2, max_2 = _left(its + 2 * SIZE, row, more, KEPT, BLOCK_D)
            more = tl.where(split + 3 < end_split, count, 0)
            acc_3, sum_3, max_3 = _left(its + 3 * SIZE, row, more, KEPT, BLOCK_D)
            total, total_sum, total_max = merged(total, total_sum, total_max, acc_0, sum_0, max_0)
            total, total_sum, total_max = merged(total, total_sum, total_max, acc_1, sum_1, max_1)
            total, total_sum, total_max = merged(total, total_sum, total_max, acc_2, sum_2, max_2)
            total, total_sum, total_max = merged(total, total_sum, total_max, acc_3, sum_3, max_3)
        total = total / tl.where(total_sum == 0, 1.0, total_sum)[:, None]
        total = tl.where(total == 0, 0.0, total)
        target = (row // GROUP).to(tl.int64) * out_stride + row % GROUP * out_head_stride
        tl.store(
            out_ptr + target[:, None] + channel[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=(row < count)[:, None] & (channel < HEAD_SIZE)[None, :],
        )
