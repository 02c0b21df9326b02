# mypy: allow-untyped-defs, no-check-untyped-defs
"""The first kernel of hyper-connections: what a sublayer gave is added to the streams, which are
multiplied with ``fn``.

Each program takes some channels of all streams, so that ``fn``, which is most of what a decode
reads, is read by all multiprocessors at once.
"""

import functools

import torch
import triton
import triton.language as tl

from reprise.ops.triton_util import DeviceLimits, cdiv, depend, dot, fetch, next_power_of_2

_FEW = 8
"""Tokens up to which sums are made without matrix units."""


@functools.cache
def mix_options(
    tokens: int, size: int, rows: int, dtype: torch.dtype, device: DeviceLimits
) -> tuple[int, dict[str, int]]:
    """Channels of a program, and constants."""
    block_rows = next_power_of_2(rows)
    if tokens <= _FEW:
        here = next_power_of_2(tokens)
        channels = min(128, max(16, next_power_of_2(cdiv(size, device.multiprocessors))))
        step = min(channels, max(16, 4096 // (here * block_rows)))
        return channels, {
            "TOKENS": here, "STEP": step, "UNITS": False, "PARTS": 1,
            "BLOCK_OUTPUTS": block_rows, "num_warps": 4, "num_stages": 1,
        }  # fmt: skip
    here = 16 if tokens <= 512 else 32
    tiles = cdiv(tokens, here)
    step = 32
    splits = max(1, min(cdiv(size, step), cdiv(2 * device.multiprocessors, tiles)))
    # Of the head's four outputs fewer columns would do, and registers would not.
    return cdiv(cdiv(size, splits), step) * step, {
        "TOKENS": here, "STEP": step, "UNITS": True,
        "PARTS": 3 if dtype == torch.bfloat16 else 1,
        "BLOCK_OUTPUTS": max(32, block_rows), "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def stream_mix_kernel(
    streams_ptr,
    fn_ptr,
    y_ptr,
    post_ptr,
    comb_ptr,
    found_ptr,
    tokens,
    channels,
    fn_stride,
    SIZE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes ``channels`` of all streams of TOKENS tokens.

    UNITS: products are those of matrix units. PARTS: of float32 numbers of ``fn``, so many numbers
    of the streams' dtype that are multiplied one by one: bfloat16 has room for all bits in three.
    """
    split = tl.program_id(0)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    real = token < tokens
    output = tl.arange(0, BLOCK_OUTPUTS)
    real_output = output < OUTPUTS
    line = tl.arange(0, BLOCK_OUTPUTS * 4)
    first = tl.minimum(line // 4, OUTPUTS - 1) * fn_stride + line % 4 * SIZE + split * channels
    for start in range(0, channels, 32):
        fetch(fn_ptr + tl.minimum(first + start, OUTPUTS * fn_stride - 1), EARLY)
    depend(EARLY)
    squares = tl.zeros([TOKENS], dtype=tl.float32)
    if UNITS:
        acc = tl.zeros([TOKENS, BLOCK_OUTPUTS], dtype=tl.float32)
    else:
        acc = tl.zeros([TOKENS, BLOCK_OUTPUTS, STEP], dtype=tl.float32)
    matrix = comb_ptr + token * 16
    for start in range(0, channels, STEP):
        channel = split * channels + start + tl.arange(0, STEP)
        real_channel = channel < SIZE
        inside = real[:, None] & real_channel[None, :]
        y = tl.load(y_ptr + token[:, None] * SIZE + channel[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        place = streams_ptr + token[:, None] * (4 * SIZE) + channel[None, :]
        x0 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(place + SIZE, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(place + 2 * SIZE, mask=inside, other=0.0).to(tl.float32)
        x3 = tl.load(place + 3 * SIZE, mask=inside, other=0.0).to(tl.float32)
        # Where there are fewer channels than threads several warps hold the same ones, and each
        # multiplies them with other rows of fn: all have read before one writes.
        tl.debug_barrier()
        for k in tl.static_range(4):
            factor = tl.load(post_ptr + token * 4 + k, mask=real, other=0.0)
            c0 = tl.load(matrix + k, mask=real, other=0.0)
            c1 = tl.load(matrix + 4 + k, mask=real, other=0.0)
            c2 = tl.load(matrix + 8 + k, mask=real, other=0.0)
            c3 = tl.load(matrix + 12 + k, mask=real, other=0.0)
            mixed = c0[:, None] * x0 + c1[:, None] * x1 + c2[:, None] * x2 + c3[:, None] * x3
            narrow = (factor[:, None] * y + mixed).to(streams_ptr.dtype.element_ty)
            tl.store(place + k * SIZE, narrow, mask=inside)
            wide = narrow.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            if UNITS:
                weight = tl.load(
                    fn_ptr + output[None, :] * fn_stride + k * SIZE + channel[:, None],
                    mask=real_output[None, :] & real_channel[:, None],
                    other=0.0,
                )
                if PARTS == 3:
                    for _ in tl.static_range(3):
                        part = weight.to(tl.bfloat16)
                        acc = dot(narrow.to(tl.bfloat16), part, acc, WIDEN)
                        weight = weight - part.to(tl.float32)
                else:
                    acc = dot(wide, weight, acc, WIDEN)
            else:
                weight = tl.load(
                    fn_ptr + output[:, None] * fn_stride + k * SIZE + channel[None, :],
                    mask=real_output[:, None] & real_channel[None, :],
                    other=0.0,
                )
                acc += wide[:, None, :] * weight[None, :, :]
    if not UNITS:
        acc = tl.sum(acc, axis=2)
    target = found_ptr + (split * tokens + token) * WIDTH
    tl.store(target[:, None] + output[None, :], acc, mask=real[:, None] & real_output[None, :])
    tl.store(target + OUTPUTS, squares, mask=real)
