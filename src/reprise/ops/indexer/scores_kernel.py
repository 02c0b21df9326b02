# mypy: allow-untyped-defs, no-check-untyped-defs
"""The indexer's scores: sums over a token's heads, made where they are multiplied, so that what
lies in memory is one number a row.

Programs for a token each take an equal part of the rows that it sees, whose number is read on the
device.
"""

import triton
import triton.language as tl

from reprise.ops.load_codes import plain
from reprise.ops.request_of import request_of
from reprise.ops.triton_util import depend, dot


@triton.jit
def _order(x):
    """int32 in the order of float32, above the smallest one: NaN as the largest, both zeros the
    same."""
    x = tl.where(x != x, float("inf"), tl.where(x == 0, 0.0, x))
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["requests", "first"])
def index_scores_kernel(
    query_ptr,
    weights_ptr,
    keys_ptr,
    scales_ptr,
    table_ptr,
    scores_ptr,
    peaks_ptr,
    seq_lens_ptr,
    starts_ptr,
    requests,
    first,
    room,
    query_stride,
    query_head_stride,
    query_channel_stride,
    weights_stride,
    weights_head_stride,
    block_stride,
    slot_stride,
    channel_stride,
    scale_block_stride,
    scale_slot_stride,
    table_stride,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODES: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program scores a part of the rows of a token.

    scores: [T, room] int32 in the order of the scores; peaks: the largest of each GROUP of these,
    unless that is 0.
    """
    here = tl.program_id(0)
    token = (first + here).to(tl.int64)
    part = tl.program_id(1)
    request, position = request_of(token, seq_lens_ptr, starts_ptr, requests, BLOCK_R)
    count = tl.minimum((position + 1) // EVERY, room).to(tl.int32)
    tiles = tl.cdiv(count, BLOCK_N)
    each, more = tiles // tl.num_programs(1), tiles % tl.num_programs(1)
    begin = part * each + tl.minimum(part, more)
    end = begin + each + (part < more).to(tl.int32)
    head = tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_D)
    real = (head < HEADS)[None, :] & (channel < SIZE)[:, None]
    depend(EARLY)
    if part >= tiles:
        return
    query = tl.load(
        query_ptr
        + token * query_stride
        + head[None, :] * query_head_stride
        + channel[:, None] * query_channel_stride,
        mask=real,
        other=0.0,
    )
    factor = tl.load(
        weights_ptr + token * weights_stride + head * weights_head_stride,
        mask=head < HEADS,
        other=0.0,
    ).to(tl.float32)
    tables = table_ptr + request.to(tl.int64) * table_stride
    target = scores_ptr + here.to(tl.int64) * room
    if GROUP > 0:
        peaks = peaks_ptr + here.to(tl.int64) * tl.cdiv(room, GROUP)
    for tile in range(begin, end):
        # Without a sign, so that a quotient is a shift.
        number = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.uint32)
        seen = number < count.to(tl.uint32)
        block = tl.load(tables + number // BLOCK, mask=seen, other=0)
        block, slot = block.to(tl.int64), (number % BLOCK).to(tl.int64)
        offset = block * block_stride + slot * slot_stride
        rows = tl.load(
            keys_ptr + offset[:, None] + channel[None, :] * channel_stride,
            mask=seen[:, None] & (channel < SIZE)[None, :],
            other=0.0,
        )
        if CODES:
            rows = plain(rows, query_ptr.dtype.element_ty, PAIRS)
        zero = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
        found = tl.maximum(dot(rows, query, zero, WIDEN), 0.0, propagate_nan=tl.PropagateNan.ALL)
        score = tl.sum(found * factor[None, :], axis=1) * scale
        if CODES:
            place = scales_ptr + block * scale_block_stride + slot * scale_slot_stride
            score *= tl.load(place, mask=seen, other=0.0)
        key = _order(score)
        tl.store(target + number, key, mask=seen)
        if GROUP > 0:
            grouped = tl.reshape(tl.where(seen, key, -0x7FFFFFFF), [BLOCK_N // GROUP, GROUP])
            group = tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
            tl.store(peaks + group, tl.max(grouped, axis=1), mask=group * GROUP < count)
