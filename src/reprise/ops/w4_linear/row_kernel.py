# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of one row with a weight of four bits in Triton, with the norm before and the activation
or sum behind them.

As :mod:`reprise.ops.linear.triton` has it for plain weights. What bounds it is less the bandwidth
than what it takes to make numbers of bits, so that is hardly more than one operation each: it masks
the number where it lies and gives it the exponent of a float32 between 1 and 2. What is multiplied
so is 1 and a small part, and the sum of ``x`` makes good for what is too much. Where ``x`` is
bfloat16, :mod:`reprise.ops.w4_linear.half_words` multiplies two numbers at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import (
    INTERPRETED,
    arrivals,
    cdiv,
    depend,
    is_last,
    launch,
    launch_options,
    limits,
    next_power_of_2,
    silu,
    takes_ptx,
    with_gain,
)
from reprise.ops.w4_linear.half_words import halves, part_product

_FEATURES = 8
"""Rows of the weight in a tile."""
_MOST_WORDS = 512
"""Of a row in a tile; programs with other shares of longer rows sum."""
_LANE_WORDS = 128
"""Of a row, that a warp reads side by side. It has whole rows of a tile, some of them, so that no
sum needs another warp's."""
_PROGRAMS = 3
"""To aim at, on a multiprocessor: all run at once, each with several tiles."""
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
    block = min(_MOST_WORDS, next_power_of_2(words))
    half = x.dtype is torch.bfloat16 and (INTERPRETED or takes_ptx())
    splits, tiles = cdiv(words, block), cdiv(features, _FEATURES // (1 + gated))
    most = _PROGRAMS * limits(x.device).multiprocessors
    each = cdiv(tiles * splits, most)
    programs = cdiv(tiles, each)
    partial = x
    if splits > 1:
        partial = x.new_empty((splits, programs * each * _FEATURES), dtype=torch.float32)
    launch(w4_row_kernel, (programs * splits,))(
        x,
        norm_weight,
        packed,
        scales,
        zeros,
        bias,
        out,
        partial,
        arrivals(programs, x.device),
        features,
        eps,
        _ONE,
        WORDS=words,
        GROUP=group,
        GATED=gated,
        ADD=add,
        SPLITS=splits,
        TILES=each,
        MOST_TILES=next_power_of_2(each),
        BLOCK_N=_FEATURES,
        BLOCK_W=block,
        LANE_W=min(block, _LANE_WORDS) if half else block,
        HALF=half,
        PTX=takes_ptx(),
        num_warps=_WARPS,
        **launch_options(),
    )


@triton.jit
def _rows(tile, features, GATED: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr):
    """Of TILES tiles from ``tile`` on: the rows of the weight, or one that is not there."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    i = tl.arange(0, TILES * BLOCK_N)
    feature = (tile + i // BLOCK_N) * WIDTH + i % WIDTH
    n = feature + i % BLOCK_N // WIDTH * features
    return tl.where(feature < features, n, features * (BLOCK_N // WIDTH))


@triton.jit
def _weight(
    packed_ptr, scales_ptr, zeros_ptr, n, outputs, word, part,
    WORDS: tl.constexpr, GROUP: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Of a tile of the weight: words [W, BLOCK_N, C], zeros outside of it; [PARTS, BLOCK_N, C]
    scales, and what stands for zero if there are such. word: [W, C]; part: [PARTS, C]."""
    inside = (n < outputs)[None, :, None]
    if WORDS % BLOCK_W != 0:
        inside = inside & (word < WORDS)[:, None, :]
    # Read once, so not worth caching.
    words = tl.load(
        packed_ptr + n.to(tl.int64)[None, :, None] * WORDS + word[:, None, :],
        mask=inside, other=0, eviction_policy="evict_first",
    )  # fmt: skip
    GROUPS: tl.constexpr = WORDS * 8 // GROUP
    group = tl.minimum(part // (GROUP // 32), GROUPS - 1)
    offset = tl.minimum(n, outputs - 1).to(tl.int64)[None, :, None] * GROUPS + group[:, None, :]
    scale = tl.load(scales_ptr + offset)
    zero = scale
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + offset)
    return words, scale, zero


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
    """[W, N, C] words times [W, 1, C] eight times, those of :func:`_columns`: their sums."""
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
                word, x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, one,
            ],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )  # fmt: skip
    left = word << 12
    right = word >> 8
    acc = _low(left, one) * x_0
    acc += _high(left, one) * x_2
    acc += _high(word << 8, one) * x_4
    acc += _low(word, one) * x_6
    acc += _high(word, one) * x_1
    acc += _low(right, one) * x_3
    acc += _high(right, one) * x_5
    return acc + _high(word >> 12, one) * x_7


@triton.jit
def _columns(x):
    """[P, 4, 8] float32 to eight of [P, 4]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 4, 2, 2, 2]))
    x_04, x_26 = tl.split(even)
    x_15, x_37 = tl.split(odd)
    x_0, x_4 = tl.split(x_04)
    x_1, x_5 = tl.split(x_15)
    x_2, x_6 = tl.split(x_26)
    x_3, x_7 = tl.split(x_37)
    return x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7


@triton.jit
def _of_words(x, CHUNKS: tl.constexpr):
    """[P, 4] to [4 * P / CHUNKS, 1, CHUNKS], as words are."""
    PARTS: tl.constexpr = x.shape[0] // CHUNKS
    x = tl.permute(tl.reshape(x, [CHUNKS, PARTS, 4]), [1, 2, 0])
    return tl.reshape(x, [PARTS * 4, 1, CHUNKS])


@triton.jit
def _of_parts(x, CHUNKS: tl.constexpr):
    """[P] to [P / CHUNKS, 1, CHUNKS], as scales are."""
    return tl.trans(tl.reshape(x, [CHUNKS, x.shape[0] // CHUNKS]))[:, None, :]


@triton.jit
def _store(
    y, bias_ptr, out_ptr, before, tile, end, features,
    GATED: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the sums of tiles from ``tile`` up to ``end``, with all that comes behind the product.

    y: [TILES * BLOCK_N], gates first in each tile if GATED; before: what ``out`` holds, if ADD.
    """
    TILES: tl.constexpr = y.shape[0] // BLOCK_N
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if bias_ptr is not None:
        n = _rows(tile, features, GATED, BLOCK_N, TILES)
        real = n < features * (BLOCK_N // WIDTH)
        y += tl.load(bias_ptr + n, mask=real, other=0.0).to(tl.float32)
    if GATED:
        pairs = tl.reshape(y.to(kind).to(tl.float32), [TILES, 2, WIDTH])
        gate, up = tl.split(tl.permute(pairs, [0, 2, 1]))
        y = tl.reshape(silu(gate, kind) * up, [TILES * WIDTH])
    if ADD:
        y += before.to(tl.float32)
    column = tile * WIDTH + tl.arange(0, TILES * WIDTH)
    tl.store(out_ptr + column, y.to(kind), mask=column < tl.minimum(end * WIDTH, features))


@triton.jit
def _before(out_ptr, tile, features, ADD: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr):
    """What is there of the outputs of TILES tiles."""
    column = tile * BLOCK_N + tl.arange(0, TILES * BLOCK_N)
    before = tl.zeros([TILES * BLOCK_N], dtype=out_ptr.dtype.element_ty)
    if ADD:
        before = tl.load(out_ptr + column, mask=column < features, other=0.0)
    return before


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
    partial_ptr,
    arrivals_ptr,
    features,
    eps,
    one,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    MOST_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LANE_W: tl.constexpr,
    HALF: tl.constexpr,
    PTX: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes TILES tiles, one after the other, each of BLOCK_N of ``features``
    outputs, or half as many if GATED, from one of SPLITS shares of the inputs.

    x: [8 * WORDS], normalised first if there is a norm. packed: [features, WORDS], or twice as many
    rows if GATED: gates, then what they let through; scales, zeros: as many rows, a column for each
    GROUP inputs. partial: [SPLITS, tiles, BLOCK_N] float32. MOST_TILES: a power of two.
    """
    INPUTS: tl.constexpr = WORDS * 8
    CHUNKS: tl.constexpr = BLOCK_W // LANE_W
    PARTS: tl.constexpr = LANE_W // 4  # a thread's own sums are of 32 inputs
    outputs = features * (2 if GATED else 1)
    which = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    tile, end = which * TILES, which * TILES + TILES
    chunk = split * CHUNKS + tl.arange(0, CHUNKS)[None, :]
    word = chunk * LANE_W + tl.arange(0, LANE_W)[:, None]
    part = chunk * PARTS + tl.arange(0, PARTS)[:, None]
    n = _rows(tile, features, GATED, BLOCK_N, 1)
    packed, scale, zero = _weight(
        packed_ptr, scales_ptr, zeros_ptr, n, outputs, word, part, WORDS, GROUP, BLOCK_W
    )
    depend(EARLY)

    # A thread has the inputs of four words, as of the weight.
    k = split * (BLOCK_W * 8) + tl.arange(0, CHUNKS * PARTS)[:, None, None] * 32
    k += tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    x = tl.load(x_ptr + k, mask=k < INPUTS, other=0.0)
    value = x.to(tl.float32)
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + k, mask=k < INPUTS, other=0.0)
        squares = value * value
        if SPLITS > 1:
            squares = tl.zeros([CHUNKS * PARTS, 4, 8], dtype=tl.float32)
            for other in tl.static_range(SPLITS):
                j = k + (other - split) * (BLOCK_W * 8)
                each = tl.load(x_ptr + j, mask=j < INPUTS, other=0.0).to(tl.float32)
                squares += each * each
        total = tl.sum(tl.sum(tl.sum(squares, axis=2), axis=1), axis=0)
        value = value * tl.rsqrt(total / INPUTS + eps)
        value = with_gain(value, gain, x.dtype).to(x.dtype).to(tl.float32)
    x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7 = _columns(value)
    if HALF:
        both = ((x_0 + x_1) + (x_2 + x_3)) + ((x_4 + x_5) + (x_6 + x_7))
        sums = tl.sum(both, axis=1) * (128.0 / 1024)
        x_0, x_1, power = halves(x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, PTX)
        power = _of_parts(power, CHUNKS)
        ones = -sums
        if zeros_ptr is None:
            ones = sums * (8.0 / 128)
    else:
        low, high = x_0 + x_3 + x_6, x_1 + x_2 + x_4 + x_5 + x_7
        # Numbers in lower bits are a sixteenth of those in higher ones.
        x_0, x_3, x_6 = x_0 * 16, x_3 * 16, x_6 * 16
        ones = tl.sum(low * 16 + high, axis=1)
        sums = tl.sum(low + high, axis=1)
        if zeros_ptr is None:
            ones += sums * (8.0 / 128)
        else:
            ones -= sums  # what stands for zero is made a number between 1 and 2, as all others
        x_2, x_3 = _of_words(x_2, CHUNKS), _of_words(x_3, CHUNKS)
        x_4, x_5 = _of_words(x_4, CHUNKS), _of_words(x_5, CHUNKS)
        x_6, x_7 = _of_words(x_6, CHUNKS), _of_words(x_7, CHUNKS)
    x_0, x_1 = _of_words(x_0, CHUNKS), _of_words(x_1, CHUNKS)
    ones, sums = _of_parts(ones, CHUNKS), _of_parts(sums, CHUNKS)

    for _ in range(TILES):
        packed_now, scale_now, zero_now = packed, scale, zero
        # The next words are asked for before these are used.
        n = _rows(tl.where(tile + 1 < end, tile + 1, outputs), features, GATED, BLOCK_N, 1)
        packed, scale, zero = _weight(
            packed_ptr, scales_ptr, zeros_ptr, n, outputs, word, part, WORDS, GROUP, BLOCK_W
        )
        before = _before(out_ptr, tile, features, ADD and SPLITS == 1, BLOCK_N, 1)
        if HALF:
            product = part_product(packed_now, x_0, x_1, PTX) * power - ones
        else:
            product = _product(packed_now, one, x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, PTX)
            product = tl.sum(tl.reshape(product, [PARTS, 4, BLOCK_N, CHUNKS]), axis=1) - ones
        if zeros_ptr is not None:
            product -= _high(zero_now.to(tl.int32) << 16, one) * sums
        product = tl.sum(scale_now.to(tl.float32) * product, axis=2)
        y = tl.sum(product, axis=0) * (1024 if HALF else 128)
        if SPLITS > 1:
            at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            size = tl.num_programs(0) // SPLITS * (TILES * BLOCK_N)
            tl.store(partial_ptr + split * size + at, y)
        else:
            _store(y, bias_ptr, out_ptr, before, tile, end, features, GATED, ADD, BLOCK_N)
        tile += 1

    last = False
    if SPLITS > 1:
        last = is_last(arrivals_ptr + which, SPLITS)
    if last:
        tile = which * TILES
        before = _before(out_ptr, tile, features, ADD, BLOCK_N, MOST_TILES)
        i = tl.arange(0, MOST_TILES * BLOCK_N)
        size = tl.num_programs(0) // SPLITS * (TILES * BLOCK_N)
        sums_ptr = partial_ptr + tile * BLOCK_N + i
        y = tl.zeros([MOST_TILES * BLOCK_N], dtype=tl.float32)
        for other in tl.static_range(SPLITS):
            # Just written: the nearest cache may hold older values.
            y += tl.load(
                sums_ptr + other * size, mask=i < TILES * BLOCK_N, other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
        _store(y, bias_ptr, out_ptr, before, tile, end, features, GATED, ADD, BLOCK_N)
