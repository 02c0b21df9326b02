# mypy: allow-untyped-defs, no-check-untyped-defs
"""Paged attention in Triton such that the bits of a token depend on its request's tokens alone.

Keys are taken in splits that begin at multiples of :data:`SPLIT`, wherever the query is and however
many tokens are computed with it. Each split has a softmax of its own, and what splits give is
merged in their order. Whether one program does so split by split, or several programs at once of
which the last one merges, changes no bit: a few requests with long contexts would leave most of a
device idle, and of many tokens the parts would be much to keep. There is one size of tile for
steps of any kind; what a row does not see adds zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from reprise.ops.paged_attention.absolute_decode_kernel import launch_decodes
from reprise.ops.paged_attention.attend import Call, Config, attend
from reprise.ops.paged_attention.merge_splits import merge, merged
from reprise.ops.paged_attention.scores import blocks
from reprise.ops.triton_util import (
    APART,
    INTERPRETED,
    DeviceLimits,
    arrivals,
    cdiv,
    depend,
    is_last,
    launch,
    limits,
    next_power_of_2,
)

SPLIT = 512
"""Keys."""
_MOST_PARTS = 64
"""Programs that share a tile."""
_MOST_KEPT = 64 << 20
"""Bytes that programs may leave for each other."""
_FEW_REQUESTS = 16
"""Up to so many, each has programs of its own."""


def steady_config(
    group: int, head_size: int, element_size: int, device: DeviceLimits, codes: bool
) -> Config:
    """Sizes of all launches; ``group`` is query heads of a KV head, ``codes``: keys and values have
    one byte a channel."""
    smallest, wide = next_power_of_2(group), next_power_of_2(head_size) > 128
    if INTERPRETED:
        return Config(max(16, smallest), 64, 1, 1)
    if element_size == 4:
        return Config(max(16, smallest), 16, 8 if wide else 4, 1)
    if device.shared_memory < 128 * 1024 or wide:
        return Config(max(64, smallest), 32, 8 if wide else 4, 1)
    return Config(max(64, smallest), 64, 4, 2 if codes else 3)


def parts_of(programs: int, splits: int, device: DeviceLimits) -> int:
    """How many programs share a tile, where ``programs`` would be all: a power of two, for each of
    which the kernel is compiled."""
    most = max(1, min(splits, _MOST_PARTS, 2 * device.multiprocessors // programs))
    return int(1 << most.bit_length() - 1)


def paged_attention(*args: object, **kwargs: object) -> None:
    """Arguments as in the reference."""
    bind(*args, **kwargs)


def bind(*args, **kwargs) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    call = Call(*args, **kwargs)
    tokens, _, head_size = call.query.shape
    _, block_size, kv_heads, _ = call.key_cache.shape
    requests, group = call.block_tables.shape[0], call.group
    device = limits(call.query.device)
    codes = call.key_scales is not None
    config = steady_config(group, head_size, call.query.element_size(), device, codes)
    block_q = config.block_m // group
    uniform = 0 < call.query_len <= block_q
    # Request r's tiles start at query_start_loc[r] // block_q + r, which leaves each enough; where
    # all have the same few tokens, it is tile r.
    tiles = requests if uniform else cdiv(tokens, block_q) + requests
    splits = cdiv(call.block_tables.shape[1] * block_size, SPLIT)
    parts = parts_of(max(1, tiles * kv_heads), splits, device)
    options = call.options(config)
    # Of a tile, the rows that are of its tokens; where groups do not fill it there are more.
    rows = (call.query_len if uniform else block_q) * group
    kept = tiles * kv_heads * splits * rows * (options["BLOCK_D"] + 2)
    # What is left to be merged waits in registers only where it would be much to keep.
    keeps = 4 * kept > _MOST_KEPT or (parts == 1 and not uniform)
    if uniform and not keeps and requests > _FEW_REQUESTS:
        return launch_decodes(call, config, SPLIT, splits)
    parts = 1 if keeps else parts
    partial = call.out if keeps else call.query.new_empty(kept, dtype=torch.float32)
    args = (
        *call.tensors(), partial, arrivals(tiles * kv_heads, call.query.device), tokens, requests,
        splits, *call.strides_and_numbers(),
    )  # fmt: skip
    options |= {
        "GROUP": group, "BLOCK_Q": block_q, "QUERY_LEN": call.query_len if uniform else 0,
        # Registers suffice for two loops over keys.
        "CLEAR": not uniform and not codes and head_size <= 128, "KEEPS": keeps,
        "SPLIT": SPLIT, "PARTS": parts, "KEPT": rows, **APART,
    }  # fmt: skip
    grid = (tiles * kv_heads * parts,)
    run = launch(absolute_splits_kernel, grid)(*args, **options)
    return functools.partial(run, *args)


paged_attention.bind = bind  # type: ignore[attr-defined]


@triton.jit(do_not_specialize=["tokens", "requests", "splits"])
def absolute_splits_kernel(
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
    CLEAR: tl.constexpr,
    KEEPS: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program attends for BLOCK_Q new tokens of a request, for one KV head, to every split of
    keys or to each PARTS-th one.

    partial: [tiles * KV_HEADS, splits, KEPT * (BLOCK_D + 2)] float32; rows of a tile from KEPT on
    are nobody's.
    """
    part = tl.program_id(0) % PARTS
    number = tl.program_id(0) // PARTS
    kv_head = number % KV_HEADS
    # The last tiles see the most keys; starting with them leaves no long one for the end.
    tile = tl.num_programs(0) // (KV_HEADS * PARTS) - 1 - number // KV_HEADS
    row = tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]

    covered = tl.load(starts_ptr + requests)
    depend(EARLY)
    first_token = 0
    if QUERY_LEN > 0:
        request = tile
        begin = tl.load(starts_ptr + request)
        new = tl.load(starts_ptr + request + 1) - begin
        target = covered + request * QUERY_LEN + token
        behind = (token < QUERY_LEN) & (target < tokens)
        nobodys = covered + request * QUERY_LEN < tokens
    else:
        target = (tile - requests) * BLOCK_Q + token
        behind = (token < BLOCK_Q) & (target >= covered) & (target < tokens)
        nobodys = tile >= covered // BLOCK_Q + requests
    if nobodys:
        offset = target.to(tl.int64) * out_stride + head * out_head_stride
        nothing = tl.zeros([BLOCK_M, BLOCK_D], dtype=out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + offset[:, None] + channel[None, :],
            nothing,
            mask=behind[:, None] & real_channel,
        )
    if QUERY_LEN == 0:
        if nobodys:
            return
        # Binary search for the last request whose first tile is not behind this one.
        request = 0
        too_far = requests
        while request + 1 < too_far:
            middle = (request + too_far) // 2
            if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= tile:
                request = middle
            else:
                too_far = middle
        begin = tl.load(starts_ptr + request)
        new = tl.load(starts_ptr + request + 1) - begin
        first_token = (tile - begin // BLOCK_Q - request) * BLOCK_Q
        token += first_token
    if first_token >= new:
        return
    length = tl.load(seq_lens_ptr + request)

    used = (row < BLOCK_Q * GROUP) & (token < new)
    used_channel = used[:, None] & real_channel
    query_row = (begin + token).to(tl.int64)
    query_offset = query_row * query_stride + head * query_head_stride
    query = tl.load(
        query_ptr + query_offset[:, None] + channel[None, :], mask=used_channel, other=0.0
    )
    first_position = length - new + first_token
    position = length - new + token
    end_key = tl.minimum(length, first_position + BLOCK_Q)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(0, first_position - window + 1)
    key_ptr += kv_head * head_stride
    value_ptr += kv_head * head_stride
    if key_scales_ptr is not None:
        key_scales_ptr += kv_head * scale_head_stride
        value_scales_ptr += kv_head * scale_head_stride
    table_ptr += request.to(tl.int64) * table_stride

    first_split = lowest // SPLIT
    # Where there is nothing to see, one split sees nothing.
    end_split = tl.maximum(end_key - 1, lowest) // SPLIT + 1
    SIZE: tl.constexpr = KEPT * (BLOCK_D + 2)
    partial_ptr += number.to(tl.int64) * splits * SIZE
    within = row[:, None] * BLOCK_D + channel[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    total_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    if part >= end_split - first_split:
        return
    for split in range(first_split + part, end_split, PARTS):
        left = tl.maximum(split * SPLIT, lowest // BLOCK_N * BLOCK_N)
        right = tl.minimum(end_key, split * SPLIT + SPLIT)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
        if CLEAR and not WINDOWED:
            # What a mask would leave as it is needs none: up to the first token's position.
            clear = tl.maximum(left, tl.minimum(right, (first_position + 1) // BLOCK_N * BLOCK_N))
            block = blocks(table_ptr, left, lowest, clear, BLOCK_SIZE, BLOCK_N)
            acc, row_sum, row_max = attend(
                acc, row_sum, row_max, query, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr,
                table_ptr, block, left, clear, lowest, position,
                block_stride, slot_stride, scale_block_stride,
                scale, soft_cap, window,
                HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, False, WIDEN, PTX, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            left = clear
        block = blocks(table_ptr, left, lowest, right, BLOCK_SIZE, BLOCK_N)
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, query, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr,
            table_ptr, block, left, right, lowest, position,
            block_stride, slot_stride, scale_block_stride,
            scale, soft_cap, window,
            HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, True, WIDEN, PTX, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if KEEPS:
            total, total_sum, total_max = merged(total, total_sum, total_max, acc, row_sum, row_max)
        else:
            total, total_sum, total_max = acc, row_sum, row_max
            if end_split - first_split > 1:
                mine = partial_ptr + tl.cast(split, tl.int64) * SIZE
                tl.store(mine + within, acc, mask=used[:, None])
                tl.store(mine + KEPT * BLOCK_D + row, row_sum, mask=used)
                tl.store(mine + KEPT * (BLOCK_D + 1) + row, row_max, mask=used)
    alone = end_split >= 0
    if not KEEPS:
        alone = end_split - first_split == 1
        if not alone:
            sharers = tl.minimum(PARTS, end_split - first_split)
            if is_last(arrivals_ptr + number, sharers):
                target_ptr = out_ptr + (begin + first_token).to(tl.int64) * out_stride
                target_ptr += kv_head * GROUP * out_head_stride
                merge(
                    partial_ptr, target_ptr, first_split, end_split, new - first_token,
                    out_stride, out_head_stride, GROUP, HEAD_SIZE, KEPT, BLOCK_D,
                )  # fmt: skip
    if alone:
        total = total / tl.where(total_sum == 0, 1.0, total_sum)[:, None]
        # A zero has the sign of what it was added to, and that may be nobody's zeros.
        total = tl.where(total == 0, 0.0, total)
        out_offset = query_row * out_stride + head * out_head_stride
        tl.store(
            out_ptr + out_offset[:, None] + channel[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=used_channel,
        )
