# mypy: allow-untyped-defs, no-check-untyped-defs
"""The second kernel of hyper-connections: what programs of the first found of each token is summed,
in their order; factors are made of it, and from the streams the input of the next sublayer."""

from typing import Any

import triton
import triton.language as tl

from reprise.ops.triton_util import depend, next_power_of_2, warps, with_gain

_SUM_WARPS = 4
"""Of a program that sums: each of them has the whole matrix, and more would take turns."""


def sum_options(size: int, splits: int) -> dict[str, Any]:
    """Constants."""
    block = next_power_of_2(size)
    return {
        "BLOCK": block,
        "BLOCK_SPLITS": 16 if splits <= 16 else next_power_of_2(max(128, splits)),
        "num_warps": min(_SUM_WARPS, warps(block, per_thread=16)),
    }


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
