# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of one row with a weight of four bits in Triton, with the norm before and the activation
or sum behind them.

As :mod:`reprise.ops.linear.triton` has it for plain weights. What bounds it is less the bandwidth
than what it takes to make numbers of bits, so that is hardly more than one operation each: it masks
the number where it lies and gives it the exponent of a float32 between 1 and 2. What is multiplied
so is 1 and a small part, and the sum of ``x`` makes good for what is too much.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import (
    cdiv,
    depend,
    launch,
    launch_options,
    next_power_of_2,
    silu,
    takes_ptx,
    with_gain,
)

_FEATURES = 16
"""Rows of the weight that a program takes where it has all of their words at once, and the weight
has no zeros of its own, which take registers."""
_MOST_WORDS = 512
"""Of a row at a time, where these are all."""
_SOME_FEATURES, _SOME_WORDS = 8, 256
"""Otherwise: the next words are under way meanwhile."""
_WARPS = 4
_ONE = 0x3F800000
"""float32 1.0"""


def launch_row(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    group: int,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    add: bool = False,
    gated: bool = False,
) -> None:
    """Write the product to ``out``, or add it if ``add``.

    Args:
        x: [1, K], its elements side by side.
        packed: As the reference has it, like the other tensors.
        scales: The same.
        zeros: The same.
        bias: The same.
        out: [1, N].
        group: Inputs that share a scale, a multiple of 32.
        norm_weight: [K], of the root mean square norm that ``x`` goes through first, or None.
        eps: Of the norm.
        add: Keep what ``out`` holds and add to it.
        gated: ``packed`` has 2*N rows, gates first; write ``silu(gate) * up``.
    """
    words, features = packed.shape[1], out.shape[1]
    block = next_power_of_2(words)
    whole = block <= _MOST_WORDS
    block_n = _FEATURES if whole and zeros is None else _SOME_FEATURES
    launch(w4_row_kernel, (cdiv(features, block_n // (1 + gated)),))(
        x,
        norm_weight,
        packed,
        scales,
        zeros,
        bias,
        out,
        features,
        eps,
        _ONE,
        WORDS=words,
        GROUP=group,
        GATED=gated,
        ADD=add,
        BLOCK_N=block_n,
        BLOCK_W=block if whole else _SOME_WORDS,
        PTX=takes_ptx(),
        num_warps=_WARPS,
        **launch_options(),
    )


@triton.jit
def _words(packed_ptr, n, word, outputs, WORDS: tl.constexpr, BLOCK_W: tl.constexpr):
    """[BLOCK_N, BLOCK_W] of a weight, zeros outside of it. Read once, so not worth caching."""
    inside = (n < outputs)[:, None]
    if WORDS % BLOCK_W != 0:
        inside = inside & (word < WORDS)[None, :]
    offset = n.to(tl.int64)[:, None] * WORDS + word[None, :]
    return tl.load(packed_ptr + offset, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _low(word, one):
    """1 + number / 2048, float32, of the number in bits 12 to 15."""
    return ((word & 0xF000) | one).to(tl.float32, bitcast=True)


@triton.jit
def _high(word, one):
    """1 + number / 128, float32, of the number in bits 16 to 19."""
    return ((word & 0xF0000) | one).to(tl.float32, bitcast=True)


@triton.jit
def _product(word, one, x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, PTX: tl.constexpr):
    """[N, W] words times [W] eight times, those of :func:`_columns`: their sums [N, W]."""
    if PTX:
        # All of a word in one place: apart, all numbers of a tile would be in registers at once.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 s, t;
            .reg .f32 y;
            shl.b32 s, $1, 12;
            lop3.b32 t, s, 0xF000, $10, 0xEA;
            mov.b32 y, t;
            mul.f32 $0, y, $2;
            lop3.b32 t, s, 0xF0000, $10, 0xEA;
            mov.b32 y, t;
            fma.rn.f32 $0, y, $4, $0;
            shl.b32 s, $1, 8;
            lop3.b32 t, s, 0xF0000, $10, 0xEA;
            mov.b32 y, t;
            fma.rn.f32 $0, y, $6, $0;
            lop3.b32 t, $1, 0xF000, $10, 0xEA;
            mov.b32 y, t;
            fma.rn.f32 $0, y, $8, $0;
            lop3.b32 t, $1, 0xF0000, $10, 0xEA;
            mov.b32 y, t;
            fma.rn.f32 $0, y, $3, $0;
            shr.u32 s, $1, 8;
            lop3.b32 t, s, 0xF000, $10, 0xEA;
            mov.b32 y, t;
            fma.rn.f32 $0, y, $5, $0;
            lop3.b32 t, s, 0xF0000, $10, 0xEA;
            mov.b32 y, t;
            fma.rn.f32 $0, y, $7, $0;
            shr.u32 s, $1, 12;
            lop3.b32 t, s, 0xF0000, $10, 0xEA;
            mov.b32 y, t;
            fma.rn.f32 $0, y, $9, $0;
            }
            """,
            "=&f,r,f,f,f,f,f,f,f,f,r",
            [
                word, x_0[None, :], x_1[None, :], x_2[None, :], x_3[None, :],
                x_4[None, :], x_5[None, :], x_6[None, :], x_7[None, :], one,
            ],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )  # fmt: skip
    left = word << 12
    right = word >> 8
    acc = _low(left, one) * x_0[None, :]
    acc += _high(left, one) * x_2[None, :]
    acc += _high(word << 8, one) * x_4[None, :]
    acc += _low(word, one) * x_6[None, :]
    acc += _high(word, one) * x_1[None, :]
    acc += _low(right, one) * x_3[None, :]
    acc += _high(right, one) * x_5[None, :]
    return acc + _high(word >> 12, one) * x_7[None, :]


@triton.jit
def _columns(x):
    """[W, 8] float32 to eight of [W]."""
    WORDS: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, [WORDS, 2, 2, 2]))
    x_04, x_26 = tl.split(even)
    x_15, x_37 = tl.split(odd)
    x_0, x_4 = tl.split(x_04)
    x_1, x_5 = tl.split(x_15)
    x_2, x_6 = tl.split(x_26)
    x_3, x_7 = tl.split(x_37)
    return x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7


@triton.jit
def _scales(scales_ptr, zeros_ptr, rows, part, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """[BLOCK_N, PARTS] of a weight, and a 128th of what stands for zero."""
    offset = rows + tl.minimum(part // (GROUP // 32), GROUPS - 1)[None, :]
    scale = tl.load(scales_ptr + offset).to(tl.float32)
    middle = tl.full(scale.shape, 8.0 / 128, dtype=tl.float32)
    if zeros_ptr is not None:
        middle = tl.load(zeros_ptr + offset).to(tl.float32) / 128
    return scale, middle


# ``one`` is no constant, so that it lies in a register: masking and setting are one operation then.
@triton.jit(do_not_specialize=["one"])
def w4_row_kernel(
    x_ptr,
    norm_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    features,
    eps,
    one,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PTX: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_N of ``features`` outputs, or half as many if GATED.

    x: [8 * WORDS], normalised first if there is a norm. packed: [features, WORDS], or twice as many
    rows if GATED: gates, then what they let through; scales, zeros: as many rows, a column for each
    GROUP inputs.
    """
    INPUTS: tl.constexpr = WORDS * 8
    BLOCK_K: tl.constexpr = BLOCK_W * 8
    PARTS: tl.constexpr = BLOCK_K // 32  # a thread's own sums are of 32 inputs
    GROUPS: tl.constexpr = INPUTS // GROUP
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    i = tl.arange(0, BLOCK_N)
    feature = tl.program_id(0) * WIDTH + i % WIDTH
    outputs = features * (BLOCK_N // WIDTH)
    n = tl.where(feature < features, feature + i // WIDTH * features, outputs)
    word = tl.arange(0, BLOCK_W)
    k = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    part = tl.arange(0, PARTS)
    packed = _words(packed_ptr, n, word, outputs, WORDS, BLOCK_W)
    rows = tl.minimum(n, outputs - 1).to(tl.int64)[:, None] * GROUPS
    scale, middle = _scales(scales_ptr, zeros_ptr, rows, part, GROUP, GROUPS)
    depend(EARLY)

    norm = 1.0
    if norm_ptr is not None:
        squares = tl.zeros([BLOCK_W, 8], dtype=tl.float32)
        for start in range(0, INPUTS, BLOCK_K):
            x = tl.load(x_ptr + start + k, mask=start + k < INPUTS, other=0.0).to(tl.float32)
            squares += x * x
        norm = tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / INPUTS + eps)

    acc = tl.zeros([BLOCK_N, PARTS], dtype=tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        packed_now, scale_now, middle_now = packed, scale, middle
        if start + BLOCK_K < INPUTS:  # the next words are asked for before these are used
            next_word = (start + BLOCK_K) // 8 + word
            packed = _words(packed_ptr, n, next_word, outputs, WORDS, BLOCK_W)
            ahead = (start + BLOCK_K) // 32 + part
            scale, middle = _scales(scales_ptr, zeros_ptr, rows, ahead, GROUP, GROUPS)
        x = tl.load(x_ptr + start + k, mask=start + k < INPUTS, other=0.0)
        value = x.to(tl.float32)
        if norm_ptr is not None:
            gain = tl.load(norm_ptr + start + k, mask=start + k < INPUTS, other=0.0)
            value = with_gain(value * norm, gain, x.dtype).to(x.dtype).to(tl.float32)
        x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7 = _columns(value)
        low, high = x_0 + x_3 + x_6, x_1 + x_2 + x_4 + x_5 + x_7
        # Numbers in lower bits are a sixteenth of those in higher ones.
        product = _product(
            packed_now, one, x_0 * 16, x_1, x_2, x_3 * 16, x_4, x_5, x_6 * 16, x_7, PTX
        )
        product = tl.sum(tl.reshape(product, [BLOCK_N, PARTS, 4]), axis=2)
        ones = tl.sum(tl.reshape(low * 16 + high, [PARTS, 4]), axis=1)
        sums = tl.sum(tl.reshape(low + high, [PARTS, 4]), axis=1)
        acc += scale_now * (product - (ones[None, :] + middle_now * sums[None, :]))
    y = tl.sum(acc, axis=1) * 128

    kind = out_ptr.dtype.element_ty
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)
    if GATED:
        pairs = tl.reshape(y.to(kind).to(tl.float32), [2, WIDTH])
        gate, up = tl.split(tl.permute(pairs, [1, 0]))
        y = silu(gate, kind) * up
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = column < features
    if ADD:
        y += tl.load(out_ptr + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, y.to(kind), mask=real)
