# mypy: allow-untyped-defs, no-check-untyped-defs
"""Decode of contexts so short that no program has more than one tile of keys.

All keys of a decode but the newest are older than the step, which does not write them
(:class:`reprise.cache.Batch`). Where a program has one tile of them, it has them asked for before
the kernel before has ended, so all that is waited for is the query and the newest key and value,
with which the softmax begins.
"""

import triton
import triton.language as tl

from reprise.ops.paged_attention.merge_parts import finish, pick
from reprise.ops.paged_attention.scores import blocks, capped
from reprise.ops.triton_util import depend, dot


@triton.jit
def tiles_of(lengths, real, ONE_TILE: tl.constexpr):
    """Tiles of each request's keys but the newest; one where there are none, for whoever takes the
    newest key, or clears the rows of a request without keys."""
    return tl.where(real, tl.maximum(1, tl.cdiv(lengths - 1, ONE_TILE)), 0)


@triton.jit
def attend_to_one_tile(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    out_ptr,
    arrivals_ptr,
    partial_ptr,
    log_sums_ptr,
    lengths,
    begins,
    news,
    counts,
    number,
    program,
    kv_head,
    query_stride,
    query_head_stride,
    block_stride,
    slot_stride,
    table_stride,
    out_stride,
    out_head_stride,
    scale,
    soft_cap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ONE_TILE: tl.constexpr,
    MERGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What :func:`split_kernel.split_attention_kernel` does of steps with one new token a request,
    by the program that has tile ``program`` of all; with :func:`depend`, called by all of them.

    lengths, begins, news, counts (:func:`tiles_of`), number: [BLOCK_R]; key_ptr, value_ptr: of the
    head. HEAD_SIZE is a power of two.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, HEAD_SIZE)
    ends = tl.cumsum(counts, axis=0)
    request = tl.sum((ends <= program).to(tl.int32))
    length = pick(lengths, number, request)
    begin = pick(begins, number, request)
    new = pick(news, number, request)
    count = pick(counts, number, request)
    owner = pick(ends, number, request) - count
    first_key = (program - owner) * ONE_TILE
    end_key = tl.minimum(length - 1, first_key + ONE_TILE)
    has_newest = (length > 0) & (program - owner == count - 1)

    table_ptr += request.to(tl.int64) * table_stride
    block = blocks(table_ptr, first_key, 0, end_key, BLOCK_SIZE, ONE_TILE)
    position = first_key + tl.arange(0, ONE_TILE)
    there = position < end_key
    slot = block.to(tl.int64) * block_stride + (position % BLOCK_SIZE) * slot_stride
    offset = slot[:, None] + channel[None, :]
    # Keys that are not there are read from the null block and masked as scores; values that are
    # not there must be zeros, because zero times the NaN of a stale slot is NaN.
    key = tl.load(key_ptr + offset)
    value = tl.load(value_ptr + offset, mask=there[:, None], other=0.0)
    newest = tl.maximum(length - 1, 0)
    newest_block = tl.load(table_ptr + newest // BLOCK_SIZE, mask=has_newest, other=0)
    place = newest_block.to(tl.int64) * block_stride + newest % BLOCK_SIZE * slot_stride
    depend(EARLY)
    query_offset = (begin + token).to(tl.int64) * query_stride + head * query_head_stride
    query = tl.load(
        query_ptr + query_offset[:, None] + channel[None, :],
        mask=(token < new)[:, None] & (channel >= 0)[None, :],
        other=0.0,
    )
    newest_key = tl.load(key_ptr + place + channel)
    newest_value = tl.load(value_ptr + place + channel)

    newest_score = tl.sum(query.to(tl.float32) * newest_key.to(tl.float32)[None, :], axis=1)
    scores = tl.zeros([BLOCK_M, ONE_TILE], dtype=tl.float32)
    scores = dot(query, tl.trans(key), scores, WIDEN)
    factor = scale * 1.4426950408889634
    if CAPPED:
        newest_score = capped(newest_score, scale, soft_cap)
        scores = capped(scores, scale, soft_cap)
        factor = 1.4426950408889634
    scores = tl.where(there[None, :], scores, -float("inf"))
    newest_max = tl.where(has_newest, newest_score * factor, -float("inf"))
    row_max = tl.maximum(newest_max, tl.max(scores, axis=1) * factor)
    # Of a request without keys there is nothing, and -inf + inf is NaN.
    shift = tl.where(row_max == -float("inf"), 0.0, row_max)
    weights = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
    newest_weight = tl.exp2(newest_max - shift)
    row_sum = newest_weight + tl.sum(weights, axis=1)
    newest_value = tl.where(has_newest, newest_value.to(tl.float32), 0.0)
    acc = newest_weight[:, None] * newest_value[None, :]
    acc = dot(weights.to(value.dtype), value, acc, WIDEN)
    finish(
        acc, row_sum, row_max, out_ptr, partial_ptr, log_sums_ptr, arrivals_ptr,
        request, begin, new, token, head, kv_head, program, owner, count,
        out_stride, out_head_stride, 1, HEADS, KV_HEADS, HEAD_SIZE, HEAD_SIZE, MERGED,
    )  # fmt: skip
