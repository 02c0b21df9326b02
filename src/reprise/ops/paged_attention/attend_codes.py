# mypy: allow-untyped-defs, no-check-untyped-defs
"""Attention to keys and values of eight bits, each row with a scale.

Codes become float16, which is exact and one instruction for two where hardware has it; bfloat16
would be four. Rows and weights are scaled so that float16 holds them too: a query by a power of
two, and weights by taking the scale of a value into the exponent, so that the running maximum is
that of what a row adds. Values are read as words of four channels: a matrix product wants two keys
of one channel side by side, and single bytes of shared memory would be its limit.
"""

import triton
import triton.language as tl

from reprise.ops.paged_attention.scores import blocks, capped, masked
from reprise.ops.triton_util import dot

_WIDE = tl.constexpr(64)
"""Rows from which on both operands of a product come from shared memory, as float16."""
_ROOM = tl.constexpr(14)
"""Weights are up to 2 to this power, so that small ones are normal numbers of float16."""


@triton.jit
def attend_codes(
    acc,
    row_sum,
    row_max,
    query,
    key_ptr,
    value_ptr,
    key_scales_ptr,
    value_scales_ptr,
    table_ptr,
    block,
    begin,
    end,
    lowest,
    position,
    block_stride,
    slot_stride,
    scale_block_stride,
    scale,
    soft_cap,
    window,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As :func:`attend`; a row's maximum is of scores and value scales together."""
    CODE: tl.constexpr = key_ptr.dtype.element_ty
    WORK: tl.constexpr = tl.float32 if query.dtype == tl.float32 else tl.float16
    shift_room = 0.0
    query, row_scale = _narrowed(query, WORK)
    if query.dtype == tl.float16:
        shift_room = _ROOM
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]
    WORDS: tl.constexpr = acc.shape[0] < _WIDE
    if WORDS:
        word = tl.arange(0, BLOCK_D // 4)
        real_word = (word < HEAD_SIZE // 4)[None, :]
        words_ptr = value_ptr.to(tl.pointer_type(tl.int32))
        acc0, acc1, acc2, acc3 = _parted(acc)
    for start in range(begin, end, BLOCK_N):
        key_position = start + tl.arange(0, BLOCK_N)
        there = (key_position >= lowest) & (key_position < end)
        next_block = blocks(table_ptr, start + BLOCK_N, lowest, end, BLOCK_SIZE, BLOCK_N)
        # Unsigned: products are then one instruction, and quotients none.
        within = key_position.to(tl.uint32) % BLOCK_SIZE
        slot = _product(block, block_stride) + within * slot_stride.to(tl.uint32)
        offset = slot[:, None] + channel[None, :]
        place = _product(block, scale_block_stride) + within
        if HEAD_SIZE == BLOCK_D:
            key = tl.load(key_ptr + offset)
        else:
            key = tl.load(key_ptr + offset, mask=real_channel, other=0.0)
        if WORDS:
            values_ptr = words_ptr + ((slot // 4)[:, None] + word[None, :])
            real = real_word
        else:
            values_ptr = value_ptr + offset
            real = real_channel
        # Zero times a stale NaN would be NaN.
        if MASKED:
            values = tl.load(values_ptr, mask=there[:, None] & real, other=0.0)
            value_scales = tl.load(value_scales_ptr + place, mask=there, other=1.0)
        elif HEAD_SIZE == BLOCK_D:
            values = tl.load(values_ptr)
            value_scales = tl.load(value_scales_ptr + place)
        else:
            values = tl.load(values_ptr, mask=real, other=0.0)
            value_scales = tl.load(value_scales_ptr + place)
        key_scales = tl.load(key_scales_ptr + place)

        scores = tl.zeros([acc.shape[0], BLOCK_N], dtype=tl.float32)
        scores = dot(query, tl.trans(key.to(WORK)), scores, WIDEN)
        scores *= row_scale[:, None] * key_scales[None, :]
        factor = scale * 1.4426950408889634
        if CAPPED:
            scores = capped(scores, scale, soft_cap)
            factor = 1.4426950408889634
        if MASKED:
            scores = masked(scores, key_position, there, position, window, WINDOWED)
        bits = value_scales.to(tl.int32, bitcast=True)
        exponents = tl.fma(scores, factor, ((bits >> 23) - 127).to(tl.float32)[None, :])
        new_max = tl.maximum(row_max, tl.max(exponents, axis=1))
        if MASKED:
            # A row that has seen no key yet has the maximum -inf, and -inf + inf is NaN.
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        else:
            shift = new_max
        weights = tl.exp2(exponents - (shift - shift_room)[:, None])
        decay = tl.exp2(row_max - shift)
        # Exact: the inverse of a power of two.
        inverse = (0x7F000000 - (bits & 0x7F800000)).to(tl.float32, bitcast=True)
        row_sum = row_sum * decay + tl.sum(weights * inverse[None, :], axis=1)
        mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        weights = (weights * mantissa[None, :]).to(WORK)
        if WORDS:
            value0, value1, value2, value3 = _channels(values, CODE, WORK, PTX)
            acc0 = dot(weights, value0, acc0 * decay[:, None], WIDEN)
            acc1 = dot(weights, value1, acc1 * decay[:, None], WIDEN)
            acc2 = dot(weights, value2, acc2 * decay[:, None], WIDEN)
            acc3 = dot(weights, value3, acc3 * decay[:, None], WIDEN)
        else:
            acc = dot(weights, values.to(WORK), acc * decay[:, None], WIDEN)
        row_max = new_max
        block = next_block
    if WORDS:
        acc = _joined(acc0, acc1, acc2, acc3)
    return acc, row_sum, row_max


@triton.jit
def _product(number, stride):
    """Of two numbers of 32 bits that are not negative, in 64."""
    return number.to(tl.uint32).to(tl.uint64) * stride.to(tl.uint32).to(tl.uint64)


@triton.jit
def _narrowed(query, WORK: tl.constexpr):
    """The query in another dtype, each row divided by a power of two, and these: [BLOCK_M]."""
    wide = query.to(tl.float32)
    if query.dtype == tl.float32:
        return wide, tl.full([query.shape[0]], 1.0, tl.float32)
    largest = tl.max(tl.abs(wide), axis=1)
    # The exponent's bits alone, of a normal number whose inverse is one.
    bits = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True), 0x00800000), 0x7F000000)
    bits &= 0x7F800000
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    return (wide * inverse[:, None]).to(WORK), bits.to(tl.float32, bitcast=True)


@triton.jit
def _channels(words, CODE: tl.constexpr, WORK: tl.constexpr, PTX: tl.constexpr):
    """The first channel of each word, the second, the third, the fourth."""
    if PTX and tl.float8e4nv == CODE and tl.float16 == WORK:
        # Of two words at a time. The compiler takes words apart byte by byte.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            .reg .b16 first, second, third, fourth;
            prmt.b32 low, $4, $5, 0x5140;
            prmt.b32 high, $4, $5, 0x7362;
            mov.b32 {first, second}, low;
            mov.b32 {third, fourth}, high;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $1, second;
            cvt.rn.f16x2.e4m3x2 $2, third;
            cvt.rn.f16x2.e4m3x2 $3, fourth;
            }""",
            "=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return (
        _channel(words, 0, CODE, WORK),
        _channel(words, 1, CODE, WORK),
        _channel(words, 2, CODE, WORK),
        _channel(words, 3, CODE, WORK),
    )


@triton.jit
def _channel(words, number: tl.constexpr, CODE: tl.constexpr, WORK: tl.constexpr):
    return ((words >> (8 * number)) & 0xFF).to(tl.uint8).to(CODE, bitcast=True).to(WORK)


@triton.jit
def _parted(acc):
    """[M, D] to four of [M, D // 4]: channels 0, 4, 8, ..., then 1, 5, 9, ... and so on."""
    even, odd = tl.split(acc.reshape([acc.shape[0], acc.shape[1] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _joined(first, second, third, fourth):
    """What :func:`_parted` took apart."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return pairs.reshape([first.shape[0], first.shape[1] * 4])
