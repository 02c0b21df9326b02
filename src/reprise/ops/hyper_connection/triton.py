# mypy: allow-untyped-defs, no-check-untyped-defs
"""Hyper-connections in Triton, as two kernels.

The first adds what a sublayer gave to the streams and multiplies them with ``fn``: each program
takes some channels of all streams, so that ``fn``, which is most of what a decode reads, is read by
all multiprocessors at once. The second sums what these found, in their order, makes factors of it,
and from the streams the input of the next sublayer.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import (
    INTERPRETED,
    DeviceLimits,
    cdiv,
    depend,
    dot,
    fetch,
    launch,
    launch_options,
    limits,
    next_power_of_2,
    warps,
    with_gain,
)

_FEW = 8
"""Tokens up to which sums are made without matrix units."""
_SUM_WARPS = 4
"""Of a program that sums: each of them has the whole matrix, and more would take turns."""


def hyper_connection(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    gain: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
) -> Tensor:
    """Shapes as in the reference."""
    return connect(streams, fn, base, scale, gain, iterations, eps, norm_eps, y, post, comb)


def connect(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    iterations: int,
    eps: float,
    norm_eps: float,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
) -> Tensor:
    """``gain`` None: the head, which makes one factor a stream and has no norm."""
    tokens, _, size = streams.shape
    out = streams.new_empty((tokens, size))
    if tokens == 0:
        return out
    values = streams if streams.is_contiguous() else streams.contiguous()
    y, base, scale = y.contiguous(), base.float(), scale.float()
    factors = post if post.is_contiguous() else post.contiguous()
    matrix = comb if comb.is_contiguous() else comb.contiguous()
    rows = len(fn)
    channels, options = _mix_options(tokens, size, rows, streams.dtype, limits(streams.device))
    splits = cdiv(size, channels)
    # Behind the sums with fn one of squares; rows that begin where many bytes are read at once.
    width = next_power_of_2(rows + 1)
    found = streams.new_empty((splits, tokens, width), dtype=base.dtype)
    launch(stream_mix_kernel, (splits, cdiv(tokens, options["TOKENS"])))(
        values,
        fn,
        y,
        factors,
        matrix,
        found,
        tokens,
        channels,
        fn.stride(0),
        SIZE=size,
        OUTPUTS=rows,
        WIDTH=width,
        WIDEN=INTERPRETED,
        **options,
        **launch_options(),
    )
    block = next_power_of_2(size)
    launch(stream_sum_kernel, (tokens, 1 if gain is None else 2))(
        values,
        found,
        base,
        scale,
        gain,
        factors,
        matrix,
        out,
        tokens,
        splits,
        iterations,
        eps,
        norm_eps,
        SIZE=size,
        OUTPUTS=rows,
        WIDTH=width,
        BLOCK_SPLITS=16 if splits <= 16 else next_power_of_2(max(128, splits)),
        BLOCK=block,
        HEAD=gain is None,
        num_warps=min(_SUM_WARPS, warps(block, per_thread=16)),
        **launch_options(),
    )
    for ours, given in ((values, streams), (factors, post), (matrix, comb)):
        if ours is not given:
            given.copy_(ours)
    return out


@functools.cache
def _mix_options(
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


@triton.jit
def _one(factors, output, which: tl.constexpr):
    """The factor of one output."""
    return tl.sum(tl.where(output == which, factors, 0.0), axis=0)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _soft(a, b, c, d, eps):
    """The softmax of a row, plus eps."""
    high = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - high), tl.exp(b - high), tl.exp(c - high), tl.exp(d - high)
    scale = 1 / (a + b + c + d)
    return a * scale + eps, b * scale + eps, c * scale + eps, d * scale + eps


@triton.jit
def _row(factors, output, first: tl.constexpr, eps):
    """Of the matrix, made of four outputs."""
    return _soft(
        _one(factors, output, first),
        _one(factors, output, first + 1),
        _one(factors, output, first + 2),
        _one(factors, output, first + 3),
        eps,
    )


@triton.jit
def _inverses(a, b, c, d, eps):
    """Of four numbers and eps, with one root: all that a unit for such functions is asked for."""
    a, b, c, d = a + eps, b + eps, c + eps, d + eps
    left, right = a * b, c * d
    root = tl.rsqrt(left * right)
    both = root * root
    left, right = both * left, both * right
    return b * right, a * right, d * left, c * left


@triton.jit
def _divided(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, eps):
    """Four rows, their columns divided by their sums."""
    s0, s1, s2, s3 = _inverses(
        (a0 + b0) + (c0 + d0), (a1 + b1) + (c1 + d1),
        (a2 + b2) + (c2 + d2), (a3 + b3) + (c3 + d3), eps,
    )  # fmt: skip
    return (
        a0 * s0, a1 * s1, a2 * s2, a3 * s3, b0 * s0, b1 * s1, b2 * s2, b3 * s3,
        c0 * s0, c1 * s1, c2 * s2, c3 * s3, d0 * s0, d1 * s1, d2 * s2, d3 * s3,
    )  # fmt: skip


@triton.jit
def _picked(which, a, b, c, d):
    return tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))


@triton.jit(do_not_specialize=["tokens", "splits", "iterations"])
def stream_sum_kernel(
    streams_ptr,
    found_ptr,
    base_ptr,
    scale_ptr,
    gain_ptr,
    post_ptr,
    comb_ptr,
    out_ptr,
    tokens,
    splits,
    iterations,
    eps,
    norm_eps,
    SIZE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Of a token one program makes the next input, and another one all that is for the streams: the
    matrix takes as long as the input. It is 16 numbers in registers: nothing that its rows and
    columns are divided by has to be looked for in other threads."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < SIZE
    output = tl.arange(0, WIDTH)
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    first = tl.program_id(1) == 0
    needed = channel < tl.where(first, SIZE, 0)
    base = tl.load(base_ptr + output, mask=output < OUTPUTS, other=0.0)
    if HEAD:
        scale = tl.load(scale_ptr)
    else:
        scale = tl.load(scale_ptr + tl.minimum(output // 4, 2))
        gain = tl.load(gain_ptr + channel, mask=needed, other=0.0)
    depend(EARLY)
    found = tl.load(
        found_ptr + (split * tokens + token) * WIDTH + output[None, :],
        mask=split < splits,
        other=0.0,
    )
    place = streams_ptr + token * (4 * SIZE) + channel
    x0 = tl.load(place, mask=needed, other=0.0).to(tl.float32)
    x1 = tl.load(place + SIZE, mask=needed, other=0.0).to(tl.float32)
    x2 = tl.load(place + 2 * SIZE, mask=needed, other=0.0).to(tl.float32)
    x3 = tl.load(place + 3 * SIZE, mask=needed, other=0.0).to(tl.float32)
    sums = tl.sum(found, axis=0)
    squares = tl.sum(tl.where(output == OUTPUTS, sums, 0.0), axis=0)
    factors = sums * tl.rsqrt(squares / (4 * SIZE) + norm_eps) * scale + base
    if first:
        total = (_sigmoid(_one(factors, output, 0)) + eps) * x0
        total += (_sigmoid(_one(factors, output, 1)) + eps) * x1
        total += (_sigmoid(_one(factors, output, 2)) + eps) * x2
        total += (_sigmoid(_one(factors, output, 3)) + eps) * x3
        total = total.to(out_ptr.dtype.element_ty)
        if not HEAD:
            wide = total.to(tl.float32)
            wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + norm_eps)
            total = with_gain(wide, gain, out_ptr.dtype.element_ty).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * SIZE + channel, total, mask=inside)
    elif not HEAD:
        of_output = (output >= 4) & (output < 8)
        tl.store(post_ptr + token * 4 + output - 4, 2 * _sigmoid(factors), mask=of_output)
        a0, a1, a2, a3 = _row(factors, output, 8, eps)
        b0, b1, b2, b3 = _row(factors, output, 12, eps)
        c0, c1, c2, c3 = _row(factors, output, 16, eps)
        d0, d1, d2, d3 = _row(factors, output, 20, eps)
        a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3 = _divided(
            a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, eps
        )
        for _ in range(iterations - 1):
            a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2, a3, b3, c3, d3 = _divided(
                a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2, a3, b3, c3, d3, eps
            )
            a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3 = _divided(
                a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, eps
            )
        entry = tl.arange(0, 16)
        row, column = entry // 4, entry % 4
        matrix = _picked(
            row,
            _picked(column, a0, a1, a2, a3),
            _picked(column, b0, b1, b2, b3),
            _picked(column, c0, c1, c2, c3),
            _picked(column, d0, d1, d2, d3),
        )
        tl.store(comb_ptr + token * 16 + entry, matrix)
