# mypy: allow-untyped-defs, no-check-untyped-defs
"""A tile of a group of rows: whose it is, and what becomes of its product. For kernels of experts
of any kind."""

from __future__ import annotations

import triton
import triton.language as tl

from reprise.ops.triton_util import silu


@triton.jit
def tile_of(slots_ptr, tiles_ptr, tile, most, BLOCK_M: tl.constexpr):
    """Of a tile of :mod:`groups` its expert, int64; and of its rows the places among all that are
    sorted, which of them there are, and the slots."""
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    first = tl.load(tiles_ptr + most + tile)
    end = tl.load(tiles_ptr + 2 * most + tile)
    place = first + tl.arange(0, BLOCK_M)
    real = place < end
    return expert, place, real, tl.load(slots_ptr + place, mask=real, other=0)


@triton.jit
def finish(
    acc, out_ptr, place, slot, real, column, features, limit, GATED: tl.constexpr,
    SWAP: tl.constexpr, CLAMPS: tl.constexpr,
):  # fmt: skip
    """Store a product, [rows, features] or transposed if SWAP.

    With GATED its first half are gates: of both halves, rounded to the type of ``out``, goes what
    the activation makes of them, in the order of places; the halves are clamped to ``limit`` first
    if CLAMPS. Else it goes to its slots. column: the tile's first among ``features``.
    """
    kind: tl.constexpr = out_ptr.dtype.element_ty
    result = acc.T if SWAP else acc
    BLOCK_M: tl.constexpr = result.shape[0]
    WIDTH: tl.constexpr = result.shape[1] // 2 if GATED else result.shape[1]
    if GATED:
        pairs = tl.reshape(result.to(kind).to(tl.float32), [BLOCK_M, 2, WIDTH])
        gate, up = tl.split(tl.permute(pairs, [0, 2, 1]))
        if CLAMPS:
            # What is no number stays none; and silu is not rounded before it is multiplied.
            gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
            up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
            result = gate / (1 + tl.exp(-gate)) * up
        else:
            result = silu(gate, kind) * up
    target = place if GATED else slot
    where = column + tl.arange(0, WIDTH)
    out_tile = out_ptr + target.to(tl.int64)[:, None] * features + where[None, :]
    tl.store(out_tile, result.to(kind), mask=real[:, None] & (where < features)[None, :])
