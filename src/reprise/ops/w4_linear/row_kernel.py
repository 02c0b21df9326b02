# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of one row with a weight of four bits in Triton.

As :mod:`reprise.ops.linear.triton` has it for plain weights. What bounds it is less the bandwidth
than what it takes to make numbers of bits, so that is two operations: a shift, and one that masks a
number and gives it the exponent of a float32 between 1 and 2. ``1 + number / 16`` is multiplied,
and the sum of ``x`` makes good for what is too much.
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
)

_FEATURES = 8
"""Rows of the weight that a program takes."""
_MOST_WORDS = 512
"""Of a row at a time, where these are all; else :data:`_SOME_WORDS`."""
_SOME_WORDS = 256
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
) -> None:
    """Write the product to ``out``.

    Args:
        x: [1, K], its elements side by side.
        packed: As the reference has it, like the other tensors.
        scales: The same.
        zeros: The same.
        bias: The same.
        out: [1, N].
        group: Inputs that share a scale, a multiple of 32.
    """
    words, features = packed.shape[1], out.shape[1]
    block = next_power_of_2(words)
    launch(w4_row_kernel, (cdiv(features, _FEATURES),))(
        x,
        packed,
        scales,
        zeros,
        bias,
        out,
        features,
        _ONE,
        WORDS=words,
        GROUP=group,
        BLOCK_N=_FEATURES,
        BLOCK_W=block if block <= _MOST_WORDS else _SOME_WORDS,
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
def _one_and(word, one, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """1 + number / 16, float32, of the number that a shift brings to bits 19 to 22."""
    if LEFT > 0:
        word = word << LEFT
    if RIGHT > 0:
        word = word >> RIGHT
    return ((word & 0x00780000) | one).to(tl.float32, bitcast=True)


@triton.jit
def _numbers(word, one):
    """[N, W] words to [N, 8 * W] float32, ``1 + number / 16``, in the order of the inputs."""
    low = tl.join(_one_and(word, one, 19, 0), _one_and(word, one, 11, 0))
    high = tl.join(_one_and(word, one, 15, 0), _one_and(word, one, 7, 0))
    even = tl.join(low, high)
    low = tl.join(_one_and(word, one, 3, 0), _one_and(word, one, 0, 5))
    high = tl.join(_one_and(word, one, 0, 1), _one_and(word, one, 0, 9))
    odd = tl.join(low, high)
    return tl.reshape(tl.join(even, odd), [word.shape[0], word.shape[1] * 8])


# ``one`` is no constant, so that it lies in a register: masking and setting are one operation then.
@triton.jit(do_not_specialize=["one"])
def w4_row_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    features,
    one,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_N of ``features`` outputs.

    x: [8 * WORDS]; packed: [features, WORDS]; scales, zeros: [features, 8 * WORDS / GROUP].
    """
    INPUTS: tl.constexpr = WORDS * 8
    BLOCK_K: tl.constexpr = BLOCK_W * 8
    PARTS: tl.constexpr = BLOCK_K // 32  # a thread's own sums are of 32 inputs
    GROUPS: tl.constexpr = INPUTS // GROUP
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_W)
    k = tl.arange(0, BLOCK_K)
    part = tl.arange(0, PARTS)
    packed = _words(packed_ptr, n, word, features, WORDS, BLOCK_W)
    some_n = tl.minimum(n, features - 1).to(tl.int64)[:, None] * GROUPS
    group = tl.minimum(part // (GROUP // 32), GROUPS - 1)[None, :]
    scale = tl.load(scales_ptr + some_n + group).to(tl.float32)
    depend(EARLY)

    acc = tl.zeros([BLOCK_N, PARTS], dtype=tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        now = packed
        scale_now = scale
        # What a number of zero gives: 1 + 8 / 16, or 1 + zero / 16.
        middle = tl.full([BLOCK_N, PARTS], 1.5, dtype=tl.float32)
        if zeros_ptr is not None:
            group = tl.minimum((start // 32 + part) // (GROUP // 32), GROUPS - 1)[None, :]
            middle = 1.0 + tl.load(zeros_ptr + some_n + group).to(tl.float32) / 16
        if start + BLOCK_K < INPUTS:  # the next words are asked for before these are used
            next_word = (start + BLOCK_K) // 8 + word
            packed = _words(packed_ptr, n, next_word, features, WORDS, BLOCK_W)
            ahead = (start + BLOCK_K) // 32 + part
            ahead = tl.minimum(ahead // (GROUP // 32), GROUPS - 1)[None, :]
            scale = tl.load(scales_ptr + some_n + ahead).to(tl.float32)
        x = tl.load(x_ptr + start + k, mask=start + k < INPUTS, other=0.0)
        value = x.to(tl.float32)
        sums = tl.sum(tl.reshape(value, [PARTS, 32]), axis=1)
        products = tl.reshape(_numbers(now, one) * value[None, :], [BLOCK_N, PARTS, 32])
        acc += scale_now * (tl.sum(products, axis=2) - middle * sums[None, :])
    y = tl.sum(acc, axis=1) * 16

    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < features, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < features)
