# mypy: allow-untyped-defs, no-check-untyped-defs
"""The compressor in Triton: what tokens leave, then the rows that are whole with them.

Two kernels: a row is made of what other tokens of the same step leave, so the second one waits for
the end of the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.request_of import block_of
from reprise.ops.rotary_tail.turn import turn
from reprise.ops.store_latent import row_options, row_strides, store_row
from reprise.ops.triton_util import (
    depend,
    launch,
    launch_options,
    next_power_of_2,
    warps,
    with_gain,
)

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def compressor(
    projected: Tensor,
    bias: Tensor,
    state: Tensor,
    state_slots: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    gain: Tensor,
    norm_eps: float,
    cos_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    tail: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Shapes as in the reference; rows, and blocks of both caches, may be strided."""
    tokens, requests = len(positions), len(seq_lens)
    every, channels = bias.shape
    size = len(gain)
    # Codes without numbers beside them are of what was not rounded before.
    numbers = cache if scales is None else tail
    if projected.stride(1) != 1:
        projected = projected.contiguous()
    block = next_power_of_2(channels)
    launch(compressor_keep_kernel, (tokens, 2))(
        projected,
        bias,
        state,
        state_slots,
        positions,
        projected.stride(0),
        bias.stride(0),
        *state.stride(),
        EVERY=every,
        CHANNELS=channels,
        BLOCK_SIZE=state.shape[1],
        BLOCK=block,
        num_warps=warps(block),
        **launch_options(),
    )
    block = next_power_of_2(size)
    step = min(32, next_power_of_2(every * (channels // size)))
    launch(compressor_row_kernel, (tokens // every + requests,))(
        state,
        block_tables,
        query_start_loc,
        seq_lens,
        gain,
        cos_sin,
        cache,
        tail,
        scales,
        slots,
        requests,
        tokens,
        *state.stride(),
        block_tables.stride(0),
        cos_sin.stride(0),
        *row_strides(cache, tail, scales),
        norm_eps,
        ROUNDED=tl.float32 if numbers is None else _TYPES[numbers.dtype],
        EVERY=every,
        SIZE=size,
        CHANNELS=channels,
        HALF=cos_sin.shape[1] // 2,
        STATE_BLOCK=state.shape[1],
        ROWS_BLOCK=cache.shape[1],
        BLOCK=block,
        BLOCK_R=block_of(requests),
        STEP=step,
        **row_options(cache, tail, scales),
        num_warps=warps(step * block, per_thread=32),
        **launch_options(),
    )


@triton.jit
def compressor_keep_kernel(
    projected_ptr,
    bias_ptr,
    state_ptr,
    slots_ptr,
    positions_ptr,
    row_stride,
    bias_stride,
    block_stride,
    slot_stride,
    channel_stride,
    EVERY: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes the values or the gates of a token."""
    token = tl.program_id(0).to(tl.int64)
    gates = tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    slot = tl.load(slots_ptr + token)
    phase = tl.load(positions_ptr + token) % EVERY
    column = gates * CHANNELS + channel
    biased = inside & (column >= CHANNELS)
    bias = tl.load(bias_ptr + phase * bias_stride + channel, mask=biased, other=0.0)
    target = state_ptr + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
    depend(EARLY)
    x = tl.load(projected_ptr + token * row_stride + column, mask=inside, other=0.0)
    x = (x.to(tl.float32) + bias.to(tl.float32)).to(state_ptr.dtype.element_ty)
    tl.store(target + column * channel_stride, x, mask=inside)


@triton.jit(do_not_specialize=["requests", "tokens"])
def compressor_row_kernel(
    state_ptr,
    table_ptr,
    starts_ptr,
    seq_lens_ptr,
    gain_ptr,
    cos_sin_ptr,
    cache_ptr,
    tail_ptr,
    scales_ptr,
    slots_ptr,
    requests,
    tokens,
    block_stride,
    slot_stride,
    channel_stride,
    table_stride,
    angle_stride,
    rows_block_stride,
    rows_slot_stride,
    rows_group_stride,
    rows_channel_stride,
    tail_block_stride,
    tail_slot_stride,
    tail_channel_stride,
    scale_block_stride,
    scale_group_stride,
    scale_slot_stride,
    norm_eps,
    ROUNDED: tl.constexpr,
    EVERY: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    HALF: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP: tl.constexpr,
    EACH: tl.constexpr,
    TAIL: tl.constexpr,
    ROUND: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes a row, STEP tokens at a time, in their order. ROUNDED: what the sum, the
    normalised row and the rotated one are rounded to."""
    SPAN: tl.constexpr = EVERY * (CHANNELS // SIZE)
    number = tl.arange(0, BLOCK_R)
    real = number < requests
    begins = tl.load(starts_ptr + number, mask=real, other=0)
    ends = tl.load(starts_ptr + number + 1, mask=real, other=0)
    lengths = tl.load(seq_lens_ptr + number, mask=real, other=0)
    first = tl.maximum(lengths - (ends - begins), 0) // EVERY
    counts = tl.where(real & (lengths > 0), lengths // EVERY - first, 0)
    behind = tl.cumsum(counts, axis=0)
    row = tl.program_id(0)
    there = row < tl.sum(counts, axis=0)
    request = tl.sum((behind <= row).to(tl.int32), axis=0)
    mine = number == request
    entry = tl.sum(tl.where(mine, first + row - (behind - counts), 0), axis=0)
    begin = tl.sum(tl.where(mine, begins - (lengths - (ends - begins)), 0), axis=0)
    token = tl.where(there, begin + (entry + 1) * EVERY - 1, 0)
    there = there & (token >= 0) & (token < tokens)
    slot = tl.load(slots_ptr + token, mask=there, other=0)
    channel = tl.arange(0, BLOCK)[None, :]
    inside = channel < SIZE
    gain = tl.load(gain_ptr + channel, mask=inside, other=0.0)
    depend(EARLY)
    # Block 0 is nobody's.
    if there & (slot >= ROWS_BLOCK * EVERY):
        tables = table_ptr + request.to(tl.int64) * table_stride
        high = tl.full([1, BLOCK], -float("inf"), dtype=tl.float32)
        total = tl.zeros([1, BLOCK], dtype=tl.float32)
        acc = tl.zeros([1, BLOCK], dtype=tl.float32)
        for start in range(0, SPAN, STEP):
            step = start + tl.arange(0, STEP)
            place = (entry + 1) * EVERY - SPAN + step
            # The first half of the channels is for the next row, where rows overlap.
            half = tl.where(step < SPAN - EVERY, 0, CHANNELS - SIZE)
            seen = (place >= 0) & (step < SPAN)
            block = tl.load(tables + place // STATE_BLOCK, mask=seen, other=0).to(tl.int64)
            offset = block * block_stride + place % STATE_BLOCK * slot_stride
            source = state_ptr + offset[:, None] + (half[:, None] + channel) * channel_stride
            mask = seen[:, None] & inside
            values = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            gates = tl.load(source + CHANNELS * channel_stride, mask=mask, other=-float("inf"))
            gates = gates.to(tl.float32)
            largest = tl.maximum(high, tl.max(gates, axis=0)[None, :])
            shift = tl.where(largest == -float("inf"), 0.0, largest)
            weights = tl.exp(gates - shift)
            decay = tl.exp(high - shift)
            total = total * decay + tl.sum(weights, axis=0)[None, :]
            acc = acc * decay + tl.sum(weights * values, axis=0)[None, :]
            high = largest
        made = (acc / tl.where(inside, total, 1.0)).to(ROUNDED).to(tl.float32)
        made = made * tl.rsqrt(tl.sum(made * made, axis=1) / SIZE + norm_eps)[:, None]
        made = with_gain(made, gain, ROUNDED).to(ROUNDED)
        angles = cos_sin_ptr + (entry * EVERY).to(tl.int64) * angle_stride
        y = turn(made.to(tl.float32), angles, SIZE, HALF, BLOCK, False)
        where = slot // EVERY
        store_row(
            y.to(ROUNDED).to(tl.float32), where // ROWS_BLOCK, where % ROWS_BLOCK,
            cache_ptr, tail_ptr, scales_ptr, rows_block_stride, rows_slot_stride,
            rows_group_stride, rows_channel_stride, tail_block_stride, tail_slot_stride,
            tail_channel_stride, scale_block_stride, scale_group_stride, scale_slot_stride,
            SIZE, EACH, TAIL, ROUND,
        )  # fmt: skip
