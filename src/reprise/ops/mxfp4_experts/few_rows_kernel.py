# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of groups of few rows, each with its expert's weight of four bits, in Triton.

The weight is the first operand of the matrix units, and words become operands where they lie in
registers: a word holds eight numbers, of which the first and the fifth, the second and the sixth
and so on are two shifts away from being two bfloat16 in one register. So there are four products
for each tile of words, each with two of eight inputs of ``x``. What the bits are then is a number
times 2 ** -126, as small as numbers get; the power of two that they are multiplied with makes good
for most of that, and the sum for the rest, so that one product is enough. Numbers are exact where
that power is from 2 ** -93 to 2 ** 33; a larger one is infinite, and below numbers lose bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.experts.grouped_kernel import Config
from reprise.ops.experts.groups import Groups
from reprise.ops.experts.tile import finish, tile_of
from reprise.ops.mxfp4_experts.reference import GROUP
from reprise.ops.triton_util import (
    INTERPRETED,
    DeviceLimits,
    cdiv,
    depend,
    dot,
    launch,
    launch_options,
    limits,
    next_power_of_2,
    takes_ptx,
)

_NARROWER = ((64, 3, 2, 8, 4096), (32, 5, 1, 4, 0), (16, 6, 1, 4, 0))
"""Tiles of so many rows of the weight, their stages and warps (a warp takes 32 of these rows, or
16). They are taken unless there are so many programs of wider ones on a multiprocessor, with so
many inputs."""


def launch_few_rows(
    x: Tensor,
    weight: Tensor,
    exponents: Tensor,
    groups: Groups,
    out: Tensor,
    config: Config,
    *,
    top: int,
    gated: bool,
    limit: float = 0.0,
) -> None:
    """Multiply each group's rows with its expert's weight; as :func:`launch_grouped`, bfloat16."""
    features, inputs = out.shape[1], x.shape[1]
    outputs = groups.most * (2 if gated else 1) * features
    config = narrowed(config, outputs, inputs, limits(x.device))
    width = config.block_n // 2 if gated else config.block_n
    columns = cdiv(features, width)
    # Of each word two inputs are multiplied at once. The matrix units take sixteen, but of products
    # of no more than that Triton 3.6 takes other inputs.
    block_k = min(config.block_k, max(128, next_power_of_2(inputs)))
    together = config.together if inputs % (block_k * config.together) == 0 else 1
    launch(mxfp4_few_rows_kernel, (groups.most * columns,))(
        x,
        weight.view(torch.int32),
        exponents,
        groups.slots,
        groups.tiles,
        groups.count,
        out,
        features,
        x.stride(0),
        groups.most,
        limit,
        INPUTS=inputs,
        GROUP=GROUP,
        TOP=top,
        GATED=gated,
        CLAMPS=limit != 0,
        PTX=takes_ptx(),
        WIDEN=INTERPRETED,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        TOGETHER=together,
        WHOLE=features % width == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
    )


def narrowed(config: Config, rows: int, inputs: int, device: DeviceLimits) -> Config:
    """With a tile of fewer rows of the weight where all have so few ``rows`` that wider ones occupy
    no device with programs, or so few ``inputs`` that these have little to do."""
    for block_n, stages, warps, programs, enough in _NARROWER:
        few = rows < programs * device.multiprocessors * config.block_n
        if config.block_n > block_n and (few or inputs < enough):
            config = replace(
                config, block_n=block_n, num_stages=stages, num_warps=warps, together=1
            )
    return config


@triton.jit
def _halves(words, kind: tl.constexpr):
    """The two halves of words, behind one another in a new last dimension."""
    low, high = (words & 0xFFFF).to(tl.int16), ((words >> 16) & 0xFFFF).to(tl.int16)
    return tl.join(low, high).to(kind, bitcast=True)


@triton.jit
def _pair(words, WHICH: tl.constexpr):
    """Of each word number WHICH and the fourth behind it, as two bfloat16, times 2 ** -126.

    Sign, exponent and mantissa are put in two places each, of which one has the sign and the other
    the rest: a product takes less time than a second shift."""
    SHIFT: tl.constexpr = WHICH % 2 * 4
    BITS: tl.constexpr = 0x81C081C0 - (1 << 32)
    if WHICH >= 2:
        words = words >> 8
    one = words & (0x000F000F << SHIFT)
    return (one * ((1 << (12 - SHIFT)) + (1 << (6 - SHIFT)))) & BITS


@triton.jit
def _times(pairs, factors, PTX: tl.constexpr):
    """Two bfloat16 in a word times two others, behind one another in a new last dimension."""
    if PTX:
        product = tl.inline_asm_elementwise(
            "{ .reg .b32 minus; mov.b32 minus, 0x80008000; fma.rn.bf16x2 $0, $1, $2, minus; }",
            "=r,r,r",
            [pairs, factors],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        numbers = _halves(product, tl.bfloat16)
    else:
        # By way of float16, where they are 2 ** 112 times as large: float32 may have no room for
        # what is so small.
        large = _halves((pairs & (0x80008000 - (1 << 32))) | (pairs & 0x01C001C0) << 3, tl.float16)
        factor = _halves(factors, tl.bfloat16).to(tl.float32) * 2.0**-112
        numbers = (large.to(tl.float32) * factor).to(tl.bfloat16)
    return numbers


@triton.jit
def _factors(exponents, BIAS: tl.constexpr):
    """bfloat16 of powers of two (biased exponents, 255 is no number), 2 ** (126 - BIAS) times as
    large and infinite from there on, twice in a word."""
    wide = exponents.to(tl.int32)
    bits = tl.minimum(wide * 0x80 + (126 - BIAS) * 0x80, 0x7F80)
    return tl.maximum(bits, (wide - 254) * 0x7FC0) * 0x00010001


@triton.jit(do_not_specialize=["most", "limit"])
def mxfp4_few_rows_kernel(
    x_ptr,
    weight_ptr,
    exponents_ptr,
    slots_ptr,
    tiles_ptr,
    count_ptr,
    out_ptr,
    features,
    x_stride,
    most,
    limit,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    CLAMPS: tl.constexpr,
    PTX: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_M rows of ``out`` by BLOCK_N, or half as many, of its columns.

    TOGETHER steps of BLOCK_K inputs are read at a time, so that more bytes of each row of the
    weight come together. WHOLE: no program has columns that are not there."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    WORDS: tl.constexpr = BLOCK_K // 8
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    BIAS: tl.constexpr = 32
    columns = tl.cdiv(features, WIDTH)
    tile = tl.program_id(0) // columns
    column = tl.program_id(0) % columns * WIDTH
    feature = column + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    k = tl.arange(0, BLOCK_K)
    word = tl.arange(0, WORDS)
    group = tl.arange(0, GROUPS)
    inside = (feature < features)[:, None]
    depend(EARLY)
    if tile < tl.load(count_ptr):
        expert, place, real, slot = tile_of(slots_ptr, tiles_ptr, tile, most, BLOCK_M)
        row = slot // TOP if GATED else place
        x_tile = x_ptr + row.to(tl.int64)[:, None] * x_stride + k[None, :]
        above = expert * (features.to(tl.int64) * (BLOCK_N // WIDTH))
        weight_ptr += above * (INPUTS // 8)
        exponents_ptr += above * (INPUTS // GROUP)
        weight_tile = n[:, None] * (INPUTS // 8) + word[None, :]
        exponent_tile = n[:, None] * (INPUTS // GROUP) + group[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for begin in range(0, INPUTS, TOGETHER * BLOCK_K):
            for each in tl.static_range(TOGETHER):
                start = begin + each * BLOCK_K
                words_at = weight_ptr + start // 8 + weight_tile
                exponents_at = exponents_ptr + start // GROUP + exponent_tile
                if WHOLE and INPUTS % BLOCK_K == 0:
                    words = tl.load(words_at)
                    exponents = tl.load(exponents_at)
                    x = tl.load(x_tile + start, mask=real[:, None], other=0.0)
                else:
                    some = inside & (start // 8 + word < INPUTS // 8)[None, :]
                    some_groups = inside & (start // GROUP + group < INPUTS // GROUP)[None, :]
                    some_x = real[:, None] & (start + k < INPUTS)[None, :]
                    words = tl.load(words_at, mask=some, other=0)
                    exponents = tl.load(exponents_at, mask=some_groups, other=0)
                    x = tl.load(x_tile + start, mask=some_x, other=0.0)
                factors = _factors(exponents, BIAS)
                of_words = tl.broadcast_to(factors[:, :, None], [BLOCK_N, GROUPS, GROUP // 8])
                factors = tl.reshape(of_words, [BLOCK_N, WORDS])
                # Of eight inputs the first and the fifth, ..., the fourth and the eighth.
                even, odd = tl.split(tl.reshape(x, [BLOCK_M, WORDS * 2, 2, 2]))
                x0, x2 = tl.split(even)
                x1, x3 = tl.split(odd)
                for pair in tl.static_range(4):
                    pairs = _pair(words, pair)
                    some_of_x = x0 if pair == 0 else x1 if pair == 1 else x2 if pair == 2 else x3
                    numbers = tl.reshape(_times(pairs, factors, PTX), [BLOCK_N, 2 * WORDS])
                    acc = dot(numbers, tl.trans(some_of_x), acc, WIDEN)
        acc = acc * 2.0**BIAS
        finish(acc, out_ptr, place, slot, real, column, features, limit, GATED, True, CLAMPS)
