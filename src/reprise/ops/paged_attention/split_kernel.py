# mypy: allow-untyped-defs, no-check-untyped-defs
"""Paged attention of steps in which every request has the same few new tokens: decode,
verification of drafts.

The keys of all requests, one request after the other, are cut into as many equal parts as programs
run on the device at a time, so that all end together however the lengths differ. A part may hold
the end of a request, whole ones, and the beginning of the next; of the programs that share a
request, the last to end merges what they found, always in the same order. The number of programs
follows from shapes alone, so a device graph can hold the launch; where a part begins is worked out
on the device from the lengths of the moment.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.paged_attention.attend import Call, attend
from reprise.ops.paged_attention.merge_parts import finish, pick
from reprise.ops.paged_attention.one_tile import attend_to_one_tile, tiles_of
from reprise.ops.paged_attention.scores import blocks
from reprise.ops.paged_attention.split_sizes import few_sizes, programs_of, split_config
from reprise.ops.triton_util import INTERPRETED, arrivals, depend, launch, limits

_MIN_KEYS = 32
"""A program with fewer keys costs more to merge than it saves."""


def launch_split(call: Call) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    query, query_len = call.query, call.query_len
    tokens, heads, head_size = query.shape
    kv_heads = call.key_cache.shape[2]
    requests = call.block_tables.shape[0]
    device = limits(query.device)
    config = split_config(
        call.group * query_len, requests, head_size, query.element_size(), device,
        call.key_scales is not None,
    )  # fmt: skip
    programs = programs_of(requests, config.share * device.multiprocessors // kv_heads)
    launched = call.options(config)
    # Where programs do not begin early there is no time before the wait.
    early = launched["EARLY"] or INTERPRETED
    options = {
        **launched,
        "HEADS": heads,
        "QUERY_LEN": query_len,
        "ONE_TILE": config.one_tile if early and query_len == 1 and not call.sliding_window else 0,
        "BLOCK_R": few_sizes(requests),
        "MIN_TILES": max(1, _MIN_KEYS // config.block_n),
        "MERGED": min(8, max(4, 2 * config.num_warps)),
    }
    inputs = (*call.tensors(), arrivals(requests * kv_heads, query.device))
    sizes = (tokens, requests, programs, *call.strides_and_numbers())
    grid = (programs * kv_heads,)

    def scratch() -> tuple[Tensor, Tensor]:
        # A program shares two requests at most: its first and its last.
        rows = (2 * programs, query_len * heads)
        partial = query.new_empty((*rows, head_size), dtype=torch.float32)
        return partial, query.new_empty(rows, dtype=torch.float32)

    again = launch(split_attention_kernel, grid)(*inputs, *scratch(), *sizes, **options)
    return lambda: again(*inputs, *scratch(), *sizes)


@triton.jit
def _tiles(length, new, window, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """First tile of BLOCK_N keys that a request needs, and how many.

    One for a request without keys, so that somebody clears its rows."""
    if WINDOWED:
        first = tl.maximum(0, length - new - window + 1) // BLOCK_N
    else:
        first = length * 0
    return first, tl.maximum(1, tl.cdiv(length, BLOCK_N) - first)


@triton.jit
def _part(
    lengths, news, ends, counts, number, request, begin_tile, end_tile, window,
    WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What tiles ``begin_tile`` to ``end_tile`` of all have of ``request``.

    Returns its length and new tokens, its first tile among all and how many it has, and of its keys
    the first one that is meant, the end, and the first that its oldest new token sees.
    """
    length = pick(lengths, number, request)
    new = pick(news, number, request)
    first_tile = pick(ends - counts, number, request)
    first, count = _tiles(length, new, window, WINDOWED, BLOCK_N)
    tile = tl.maximum(begin_tile, first_tile)
    stop = tl.minimum(end_tile, first_tile + count)
    first_key = (first + tile - first_tile) * BLOCK_N
    end_key = tl.minimum(length, (first + stop - first_tile) * BLOCK_N)
    lowest = length - new - window + 1 if WINDOWED else 0
    return length, new, first_tile, count, first_key, end_key, lowest


@triton.jit(do_not_specialize=["tokens", "requests", "programs"])
def split_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    seq_lens_ptr,
    starts_ptr,
    out_ptr,
    key_scales_ptr,
    value_scales_ptr,
    arrivals_ptr,
    partial_ptr,
    log_sums_ptr,
    tokens,
    requests,
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
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    WINDOWED: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MERGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program attends, for one KV head, to an equal part of all tiles of BLOCK_N keys.

    Writes ``out`` for a request that it has to itself, else ``partial`` [2 * programs,
    QUERY_LEN * HEADS, HEAD_SIZE] and the base-2 logarithm of the sum of its weights. ``arrivals``
    [R, KV_HEADS] counts the programs that are done with a request; the last one merges them all.
    With ONE_TILE, and no more tiles of so many keys than programs, a program has one of those.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
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
    if ONE_TILE > 0:
        few = tiles_of(lengths, real, ONE_TILE)
        if tl.sum(few) <= programs:
            if program >= tl.sum(few):
                depend(EARLY)
            else:
                attend_to_one_tile(
                    query_ptr, key_ptr + kv_head * head_stride, value_ptr + kv_head * head_stride,
                    table_ptr, out_ptr, arrivals_ptr, partial_ptr, log_sums_ptr,
                    lengths, begins, news, few, number, program, kv_head,
                    query_stride, query_head_stride, block_stride, slot_stride, table_stride,
                    out_stride, out_head_stride, scale, soft_cap, HEADS, KV_HEADS, HEAD_SIZE,
                    BLOCK_SIZE, CAPPED, WIDEN, BLOCK_M, ONE_TILE, MERGED, EARLY,
                )  # fmt: skip
            _clear(
                out_ptr, tl.max(begins + news), tokens, program, programs, kv_head,
                out_stride, out_head_stride,
                QUERY_LEN, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            return
    _, counts = _tiles(lengths, news, window, WINDOWED, BLOCK_N)
    counts = tl.where(real, counts, 0)
    ends = tl.cumsum(counts, axis=0)
    total = tl.sum(counts).to(tl.int64)
    busy = tl.minimum(programs, tl.maximum(1, total // MIN_TILES))
    begin_tile = (total * program // busy).to(tl.int32)
    end_tile = (total * (program + 1) // busy).to(tl.int32)
    first_request = tl.sum((ends <= begin_tile).to(tl.int32))
    last_request = tl.sum((ends < end_tile).to(tl.int32))
    # Tables are long there: where a program's first keys are is asked for before the wait. With
    # codes there are no registers for it on some devices.
    first_block = 0
    if key_scales_ptr is None:
        _, _, _, _, first_key, end_key, lowest = _part(
            lengths, news, ends, counts, number, first_request, begin_tile, end_tile, window,
            WINDOWED, BLOCK_N,
        )  # fmt: skip
        first_table = table_ptr + first_request.to(tl.int64) * table_stride
        first_block = blocks(first_table, first_key, lowest, end_key, BLOCK_SIZE, BLOCK_N)
    depend(EARLY)

    _clear(
        out_ptr, tl.max(begins + news), tokens, program, programs, kv_head,
        out_stride, out_head_stride, QUERY_LEN, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    if program >= busy:
        return
    if key_scales_ptr is not None:
        key_scales_ptr += kv_head * scale_head_stride
        value_scales_ptr += kv_head * scale_head_stride
    # Nothing is carried from one request to the next but the index: Triton 3.6 was seen to
    # compile such a loop wrongly.
    for index in range(last_request - first_request + 1):
        request = first_request + index
        begin = pick(begins, number, request)
        length, new, first_tile, count, first_key, end_key, lowest = _part(
            lengths, news, ends, counts, number, request, begin_tile, end_tile, window,
            WINDOWED, BLOCK_N,
        )  # fmt: skip
        request_table = table_ptr + request.to(tl.int64) * table_stride
        end = end_key
        if key_scales_ptr is None:
            end = tl.where(index > 0, end_key, 0)
        block = blocks(request_table, first_key, lowest, end, BLOCK_SIZE, BLOCK_N, first_block)
        used = token < new
        query_row = (begin + token).to(tl.int64)
        query_offset = query_row * query_stride + head * query_head_stride
        used_channel = used[:, None] & real_channel
        query = tl.load(
            query_ptr + query_offset[:, None] + channel[None, :], mask=used_channel, other=0.0
        )
        position = length - new + token
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
        if key_scales_ptr is not None and not WINDOWED:
            # Codes are bound by instructions: where every row sees all keys there are fewer.
            clear_end = tl.minimum(end_key, length - new + 1) // BLOCK_N * BLOCK_N
            acc, row_sum, row_max = attend(
                acc, row_sum, row_max, query,
                key_ptr + kv_head * head_stride, value_ptr + kv_head * head_stride,
                key_scales_ptr, value_scales_ptr,
                request_table, block, first_key, clear_end, lowest, position,
                block_stride, slot_stride, scale_block_stride, scale, soft_cap, window,
                HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, False, WIDEN, PTX, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            first_key = tl.maximum(first_key, clear_end)
            block = blocks(request_table, first_key, lowest, end_key, BLOCK_SIZE, BLOCK_N)
            if first_key < end_key:
                acc, row_sum, row_max = attend(
                    acc, row_sum, row_max, query,
                    key_ptr + kv_head * head_stride, value_ptr + kv_head * head_stride,
                    key_scales_ptr, value_scales_ptr,
                    request_table, block, first_key, end_key, lowest, position,
                    block_stride, slot_stride, scale_block_stride, scale, soft_cap, window,
                    HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, True, WIDEN, PTX, BLOCK_N, BLOCK_D,
                )  # fmt: skip
        else:
            acc, row_sum, row_max = attend(
                acc, row_sum, row_max, query,
                key_ptr + kv_head * head_stride, value_ptr + kv_head * head_stride,
                key_scales_ptr, value_scales_ptr,
                request_table, block, first_key, end_key, lowest, position,
                block_stride, slot_stride, scale_block_stride, scale, soft_cap, window,
                HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, True, WIDEN, PTX, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        owner = _program_of(first_tile, busy, total)
        sharers = _program_of(first_tile + count - 1, busy, total) - owner + 1
        finish(
            acc, row_sum, row_max, out_ptr, partial_ptr, log_sums_ptr, arrivals_ptr,
            request, begin, new, token, head, kv_head, program, owner, sharers,
            out_stride, out_head_stride, QUERY_LEN, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_D, MERGED,
        )  # fmt: skip


@triton.jit
def _clear(
    out_ptr, covered, tokens, program, programs, kv_head, out_stride, out_head_stride,
    QUERY_LEN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Zeros for the rows behind the last request, which all programs share out."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]
    nothing = tl.zeros([BLOCK_M, BLOCK_D], dtype=out_ptr.dtype.element_ty)
    for start in range(covered + program * QUERY_LEN, tokens, programs * QUERY_LEN):
        target = start + token
        behind = (token < QUERY_LEN) & (target < tokens)
        offset = target.to(tl.int64) * out_stride + head * out_head_stride
        tl.store(
            out_ptr + offset[:, None] + channel[None, :],
            nothing,
            mask=behind[:, None] & real_channel,
        )


@triton.jit
def _program_of(tile, programs, total):
    """The program whose part holds ``tile`` of ``total``: the greatest p with
    total * p // programs <= tile."""
    return (((tile.to(tl.int64) + 1) * programs - 1) // total).to(tl.int32)
