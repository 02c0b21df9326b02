# mypy: allow-untyped-defs, no-check-untyped-defs
"""Paged attention of any step, prefill chunks with decodes: one program takes a tile of a request's
new tokens.
"""

import functools
from collections.abc import Callable

import triton
import triton.language as tl

from reprise.ops.paged_attention.attend import Call, Config, attend
from reprise.ops.paged_attention.scores import blocks
from reprise.ops.triton_util import (
    INTERPRETED,
    DeviceLimits,
    cdiv,
    depend,
    launch,
    limits,
    next_power_of_2,
)


@functools.cache
def mixed_config(
    group: int, head_size: int, element_size: int, device: DeviceLimits, codes: bool = False
) -> Config:
    """For the mixed kernel; ``group`` is query heads of a KV head, ``codes``: keys and values have
    one byte a channel."""
    smallest = next_power_of_2(group)
    wide = next_power_of_2(head_size) > 128
    if INTERPRETED:
        return Config(max(32, smallest), 64, 1, 1)
    if element_size == 4:
        return Config(max(16, smallest), 16, 8 if wide else 4, 1)
    if codes and device.shared_memory >= 96 * 1024:
        # What codes are converted to goes through registers and shared memory.
        return Config(max(64, smallest), 16 if wide else 64, 4, 2)
    if device.shared_memory < 128 * 1024:
        return Config(max(64, smallest), 32, 4, 1)
    if device.shared_memory < 224 * 1024:
        return Config(max(128, smallest), 32 if wide else 64, 8, 3)
    return Config(max(128, smallest), 64, 8, 2 if wide else 3)


def launch_mixed(call: Call) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    tokens, _, head_size = call.query.shape
    kv_heads, requests, group = call.key_cache.shape[2], call.block_tables.shape[0], call.group
    device = limits(call.query.device)
    codes = call.key_scales is not None
    config = mixed_config(group, head_size, call.query.element_size(), device, codes)
    block_q = config.block_m // group
    # Request r's tiles start at query_start_loc[r] // block_q + r, which leaves each enough.
    tiles = cdiv(tokens, block_q) + requests
    args = (*call.tensors(), tokens, requests, *call.strides_and_numbers())
    options = {**call.options(config), "GROUP": group, "BLOCK_Q": block_q}
    grid = (tiles * kv_heads,)
    return functools.partial(launch(mixed_attention_kernel, grid)(*args, **options), *args)


@triton.jit(do_not_specialize=["tokens", "requests"])
def mixed_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    seq_lens_ptr,
    starts_ptr,
    out_ptr,
    key_scales_ptr,
    value_scales_ptr,
    tokens,
    requests,
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
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program attends for BLOCK_Q new tokens of a request, for one KV head."""
    kv_head = tl.program_id(0) % KV_HEADS
    # The last tiles see the most keys; starting with them leaves no long one for the end.
    tile = tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS
    row = tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]

    covered = tl.load(starts_ptr + requests)
    depend(EARLY)
    if tile >= covered // BLOCK_Q + requests:
        target = (tile - requests) * BLOCK_Q + token
        behind = (token < BLOCK_Q) & (target >= covered) & (target < tokens)
        offset = target.to(tl.int64) * out_stride + head * out_head_stride
        nothing = tl.zeros([BLOCK_M, BLOCK_D], dtype=out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + offset[:, None] + channel[None, :],
            nothing,
            mask=behind[:, None] & real_channel,
        )
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
    # Keys that every row sees need no mask: up to the first token's position, and from where the
    # last token's window starts.
    clear_end = (first_position + 1) // BLOCK_N * BLOCK_N
    key_ptr += kv_head * head_stride
    value_ptr += kv_head * head_stride
    if key_scales_ptr is not None:
        key_scales_ptr += kv_head * scale_head_stride
        value_scales_ptr += kv_head * scale_head_stride
    table_ptr += request.to(tl.int64) * table_stride  # type: ignore[attr-defined]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    lowest = 0
    clear_begin = 0
    if WINDOWED:
        lowest = tl.maximum(0, first_position - window + 1)
        left = lowest // BLOCK_N * BLOCK_N
        clear_begin = tl.maximum(0, first_position + BLOCK_Q - window)
        clear_begin = tl.cdiv(clear_begin, BLOCK_N) * BLOCK_N
        block = blocks(table_ptr, left, lowest, end_key, BLOCK_SIZE, BLOCK_N)
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, query, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr,
            table_ptr, block,
            left, tl.minimum(clear_begin, end_key), lowest, position,
            block_stride, slot_stride, scale_block_stride,
            scale, soft_cap, window,
            HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, True, WIDEN, PTX, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    block = blocks(table_ptr, clear_begin, lowest, clear_end, BLOCK_SIZE, BLOCK_N)
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, query, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr,
        table_ptr, block,
        clear_begin, clear_end, lowest, position,
        block_stride, slot_stride, scale_block_stride,
        scale, soft_cap, window,
        HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, False, WIDEN, PTX, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    diagonal = tl.maximum(clear_begin, clear_end)
    block = blocks(table_ptr, diagonal, lowest, end_key, BLOCK_SIZE, BLOCK_N)
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, query, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr,
        table_ptr, block,
        diagonal, end_key, lowest, position,
        block_stride, slot_stride, scale_block_stride,
        scale, soft_cap, window,
        HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, True, WIDEN, PTX, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    out_offset = query_row * out_stride + head * out_head_stride
    tl.store(
        out_ptr + out_offset[:, None] + channel[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=used_channel,
    )
