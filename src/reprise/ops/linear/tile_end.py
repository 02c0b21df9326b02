# mypy: allow-untyped-defs, no-check-untyped-defs
"""How a tile of a product ends: programs that share it sum, then bias, activation or sum, store.

A tile is [features, rows], the product transposed, since the weight is the first operand of the
matrix units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reprise.ops.triton_util import is_last, silu


@triton.jit
def summed(acc, partial_ptr, arrivals_ptr, tile, split, SPLITS: tl.constexpr):
    """The sum of the SPLITS programs that share a tile, and whether it is this one that has it: the
    last to end, which sums in the order of the splits.

    partial: [SPLITS, tiles, *acc.shape] float32; arrivals: [tiles].
    """
    last = True
    if SPLITS > 1:
        FEATURES: tl.constexpr = acc.shape[0]
        ROWS: tl.constexpr = acc.shape[1]
        within = tl.arange(0, FEATURES)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        size = tl.num_programs(0) // SPLITS * (FEATURES * ROWS)
        partial_ptr += tile * (FEATURES * ROWS) + within
        tl.store(partial_ptr + split * size, acc)
        last = is_last(arrivals_ptr + tile, SPLITS)
        if last:
            acc = tl.zeros([FEATURES, ROWS], dtype=tl.float32)
            for other in tl.static_range(SPLITS):
                # Just written: the nearest cache may hold older values.
                acc += tl.load(partial_ptr + other * size, cache_modifier=".cg")
    return acc, last


@triton.jit
def finish(
    acc, bias_ptr, out_ptr, first, features, row, rows, out_stride, GATED: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Store the tile whose first feature is ``first``, with all that comes behind the product.

    acc: [BLOCK_N, ROWS], or half as many features, gates first, if GATED. out: [rows, features].
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[1]
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if bias_ptr is not None:
        feature = first + tl.arange(0, BLOCK_N) % WIDTH
        n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
        acc += tl.load(bias_ptr + n, mask=feature < features, other=0.0).to(tl.float32)[:, None]
    if GATED:
        pairs = tl.reshape(acc.to(kind).to(tl.float32), [2, WIDTH, ROWS])
        gate, up = tl.split(tl.permute(pairs, [1, 2, 0]))
        acc = silu(gate, kind) * up
    column = first + tl.arange(0, WIDTH)
    target = out_ptr + row.to(tl.int64)[None, :] * out_stride + column[:, None]
    real = (row < rows)[None, :] & (column < features)[:, None]
    if ADD:
        acc += tl.load(target, mask=real, other=0.0).to(tl.float32)
    tl.store(target, acc.to(kind), mask=real)
