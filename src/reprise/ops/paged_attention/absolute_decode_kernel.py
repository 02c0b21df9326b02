# mypy: allow-untyped-defs, no-check-untyped-defs
"""Decodes of many requests, of the same bits as :mod:`absolute_splits_kernel`.

There a program takes one request, or each so many-th split of it; with many requests of different
lengths the longest ones end last and alone. Here programs that all run at a time get equal parts of
all keys, as in :mod:`split_kernel`, but for whole splits: one belongs to the program in whose part
it begins. What becomes of a split, and in which order a request's splits are merged, is the same.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from reprise.ops.paged_attention.attend import Call, Config, attend
from reprise.ops.paged_attention.merge_parts import pick
from reprise.ops.paged_attention.merge_splits import merge
from reprise.ops.paged_attention.scores import blocks
from reprise.ops.paged_attention.split_sizes import few_sizes
from reprise.ops.triton_util import APART, arrivals, depend, is_last, launch, limits

_SHARE = 2
"""Programs that a multiprocessor runs at a time."""


def launch_decodes(call: Call, config: Config, split: int, splits: int) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors.

    Args:
        call: Whose requests all have ``query_len`` new tokens, or are padding.
        config: As for every other step.
        split: Keys of a split.
        splits: The most that a request can have.
    """
    tokens = call.query.shape[0]
    requests, kv_heads = call.block_tables.shape[0], call.key_cache.shape[2]
    device = limits(call.query.device)
    programs = max(1, _SHARE * device.multiprocessors // kv_heads)
    options = call.options(config)
    rows = call.query_len * call.group
    kept = requests * kv_heads * splits * rows * (options["BLOCK_D"] + 2)
    args = (
        *call.tensors(), call.query.new_empty(kept, dtype=torch.float32),
        arrivals(requests * kv_heads, call.query.device), tokens, requests, splits, programs,
        *call.strides_and_numbers(),
    )  # fmt: skip
    options |= {
        "GROUP": call.group, "QUERY_LEN": call.query_len, "SPLIT": split, "KEPT": rows,
        "BLOCK_R": few_sizes(requests), **APART,
    }  # fmt: skip
    grid = (programs * kv_heads,)
    return functools.partial(launch(absolute_decode_kernel, grid)(*args, **options), *args)


@triton.jit(do_not_specialize=["tokens", "requests", "splits", "programs"])
def absolute_decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    seq_lens_ptr,
    starts_ptr,
    out_ptr,
    key_scales_ptr,
    value_scales_ptr,
    partial_ptr,
    arrivals_ptr,
    tokens,
    requests,
    splits,
    programs,
    query_stride,
    query_head_stride,
    block_stride,
    slot_stride,
    head_stride,
    scale_block_stride,
    scale_head_stride,
    table_stride,
    out_stride,
    out_head_stride,
    scale,
    soft_cap,
    window,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    PTX: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    SPLIT: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program attends, for one KV head, to the splits that begin in its part of all keys.

    partial: [requests * KV_HEADS, splits, KEPT * (BLOCK_D + 2)] float32. arrivals: [requests,
    KV_HEADS], how many splits of a request are done.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    program = tl.program_id(0) // KV_HEADS
    row = tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]

    number = tl.arange(0, BLOCK_R)
    real = number < requests
    lengths = tl.load(seq_lens_ptr + number, mask=real, other=0)
    begins = tl.load(starts_ptr + number, mask=real, other=0)
    news = tl.load(starts_ptr + number + 1, mask=real, other=0) - begins
    lowests = lengths * 0
    if WINDOWED:
        lowests = tl.maximum(0, lengths - news - window + 1)
    keys = tl.where(news > 0, tl.maximum(1, lengths - lowests // SPLIT * SPLIT), 0)
    ends = tl.cumsum(keys, axis=0)
    total = tl.sum(keys).to(tl.int64)
    begin_key = (total * program // programs).to(tl.int32)
    end_key = (total * (program + 1) // programs).to(tl.int32)
    first_request = tl.sum((ends <= begin_key).to(tl.int32))
    last_request = tl.sum((ends < end_key).to(tl.int32))
    depend(EARLY)

    nothing = tl.zeros([BLOCK_M, BLOCK_D], dtype=out_ptr.dtype.element_ty)
    covered = tl.max(begins + news)
    for start in range(covered + program * QUERY_LEN, tokens, programs * QUERY_LEN):
        target = start + token
        behind = (token < QUERY_LEN) & (target < tokens)
        offset = target.to(tl.int64) * out_stride + head * out_head_stride
        tl.store(
            out_ptr + offset[:, None] + channel[None, :],
            nothing,
            mask=behind[:, None] & real_channel,
        )
    if begin_key >= end_key:
        return
    key_ptr += kv_head * head_stride
    value_ptr += kv_head * head_stride
    if key_scales_ptr is not None:
        key_scales_ptr += kv_head * scale_head_stride
        value_scales_ptr += kv_head * scale_head_stride
    SIZE: tl.constexpr = KEPT * (BLOCK_D + 2)
    within = row[:, None] * BLOCK_D + channel[None, :]
    for index in range(last_request - first_request + 1):
        request = first_request + index
        length = pick(lengths, number, request)
        begin = pick(begins, number, request)
        new = pick(news, number, request)
        its_begin = pick(ends - keys, number, request)
        lowest = 0
        if WINDOWED:
            lowest = tl.maximum(0, length - new - window + 1)
        first = lowest // SPLIT
        # Where there is nothing to see, one split sees nothing.
        count = tl.maximum(length - 1, lowest) // SPLIT + 1 - first
        # Of its splits those that begin in this program's keys.
        from_split = tl.cdiv(tl.maximum(0, begin_key - its_begin), SPLIT)
        to_split = tl.minimum(count, tl.cdiv(tl.maximum(0, end_key - its_begin), SPLIT))
        used = (row < QUERY_LEN * GROUP) & (token < new)
        used_channel = used[:, None] & real_channel
        query_row = (begin + token).to(tl.int64)
        query_offset = query_row * query_stride + head * query_head_stride
        query = tl.load(
            query_ptr + query_offset[:, None] + channel[None, :], mask=used_channel, other=0.0
        )
        position = length - new + token
        request_table = table_ptr + request.to(tl.int64) * table_stride
        its_partial = partial_ptr + (request * KV_HEADS + kv_head).to(tl.int64) * splits * SIZE
        for split in range(first + from_split, first + to_split):
            left = tl.maximum(split * SPLIT, lowest // BLOCK_N * BLOCK_N)
            right = tl.minimum(length, split * SPLIT + SPLIT)
            acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
            block = blocks(request_table, left, lowest, right, BLOCK_SIZE, BLOCK_N)
            acc, row_sum, row_max = attend(
                acc, row_sum, row_max, query, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr,
                request_table, block, left, right, lowest, position,
                block_stride, slot_stride, scale_block_stride,
                scale, soft_cap, window,
                HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, True, WIDEN, PTX, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            if count > 1:
                mine = its_partial + tl.cast(split, tl.int64) * SIZE
                tl.store(mine + within, acc, mask=used[:, None])
                tl.store(mine + KEPT * BLOCK_D + row, row_sum, mask=used)
                tl.store(mine + KEPT * (BLOCK_D + 1) + row, row_max, mask=used)
            else:
                acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
                # A zero has the sign of what it was added to, and that may be nobody's zeros.
                acc = tl.where(acc == 0, 0.0, acc)
                out_offset = query_row * out_stride + head * out_head_stride
                tl.store(
                    out_ptr + out_offset[:, None] + channel[None, :],
                    acc.to(out_ptr.dtype.element_ty),
                    mask=used_channel,
                )
        done = to_split - from_split
        if (count > 1) & (done > 0):
            last = is_last(arrivals_ptr + request * KV_HEADS + kv_head, count, done)
            if last:
                target_ptr = out_ptr + begin.to(tl.int64) * out_stride
                target_ptr += kv_head * GROUP * out_head_stride
                merge(
                    its_partial, target_ptr, first, first + count, new,
                    out_stride, out_head_stride, GROUP, HEAD_SIZE, KEPT, BLOCK_D,
                )  # fmt: skip
