# mypy: allow-untyped-defs, no-check-untyped-defs
"""Words of four-bit numbers times a row in float16, two numbers an instruction.

A number under a mask is a float16 already, of the smallest: n * 2**-24 in its lower four bits, and
16 times that in the next four. Words hold neighbours a half apart, so a mask leaves two factors for
two neighbours of the row. These become float16 with a power of two for each 32 of them, which
leaves bfloat16 as it is (but for what is less than a 2**29th of the largest). 16 products, of four
words' halves, are summed in float16, all else in float32.
"""

import triton
import triton.language as tl


@triton.jit
def halves(x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, PTX: tl.constexpr):
    """[P, 4] eight times, float32 that bfloat16 holds: the inputs of four words, in their order.

    Returns two of [P, 4] int64, pairs of neighbours that :func:`part_product` takes, and [P]
    float32: what a sum of the products of four words is to be multiplied by, and with 1024 besides.
    """
    low = tl.maximum(tl.maximum(tl.abs(x_0), tl.abs(x_1)), tl.maximum(tl.abs(x_2), tl.abs(x_3)))
    high = tl.maximum(tl.maximum(tl.abs(x_4), tl.abs(x_5)), tl.maximum(tl.abs(x_6), tl.abs(x_7)))
    most = tl.max(tl.maximum(low, high), axis=1)
    # Exponents, so that the largest is between 2**14 and 2**15.
    power = tl.maximum(most.to(tl.int32, bitcast=True) >> 23, 14)
    factor = ((268 - power) << 23).to(tl.float32, bitcast=True)[:, None]
    x_01 = _pair(x_0 * factor, x_1 * factor, PTX)
    x_45 = _pair(x_4 * factor, x_5 * factor, PTX)
    factor *= 0.0625
    x_23 = _pair(x_2 * factor, x_3 * factor, PTX)
    x_67 = _pair(x_6 * factor, x_7 * factor, PTX)
    # Side by side, so that they change their layout at once.
    x_03 = (x_23.to(tl.int64) << 32) | (x_01.to(tl.int64) & 0xFFFFFFFF)
    x_47 = (x_67.to(tl.int64) << 32) | (x_45.to(tl.int64) & 0xFFFFFFFF)
    return x_03, x_47, (power << 23).to(tl.float32, bitcast=True)


@triton.jit
def _pair(low, high, PTX: tl.constexpr):
    """Two float32 as two float16 in an int32."""
    if PTX:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1
        )
    low = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16) | low


@triton.jit
def part_product(word, x_03, x_47, PTX: tl.constexpr):
    """[W, N, C] words times [W, 1, C] twice, of :func:`halves`: the sums of four words,
    [W / 4, N, C] float32 of a 2**24th."""
    if PTX:
        w_0, w_1, w_2, w_3 = _words(word)
        a_0, a_1, a_2, a_3 = _words(x_03)
        b_0, b_1, b_2, b_3 = _words(x_47)
        return _four_words(w_0, w_1, w_2, w_3, a_0, b_0, a_1, b_1, a_2, b_2, a_3, b_3)
    sums = _half_product(word, x_03, x_47) + _half_product(word >> 16, x_03 >> 16, x_47 >> 16)
    return tl.sum(tl.reshape(sums, [word.shape[0] // 4, 4, word.shape[1], word.shape[2]]), axis=1)


@triton.jit
def _words(word):
    """[W, N, C] to each word of four, [W / 4, N, C] four times."""
    PARTS: tl.constexpr = word.shape[0] // 4
    N: tl.constexpr = word.shape[1]
    C: tl.constexpr = word.shape[2]
    pairs = tl.permute(tl.reshape(word, [PARTS, 2, 2, N, C]), [0, 3, 4, 1, 2])
    even, odd = tl.split(pairs)
    word_0, word_2 = tl.split(even)
    word_1, word_3 = tl.split(odd)
    return word_0, word_1, word_2, word_3


@triton.jit
def _four_words(w_0, w_1, w_2, w_3, a_0, b_0, a_1, b_1, a_2, b_2, a_3, b_3):
    """The sum of the products of four words, of each with two times two pairs."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 s, t, u, x01, x23;
        .reg .b16 l, h;
        .reg .f32 a, b;
        mov.b64 {x01, x23}, $5;
        and.b32 t, $1, 0x000F000F;
        mul.rn.f16x2 u, t, x01;
        and.b32 t, $1, 0x00F000F0;
        fma.rn.f16x2 u, t, x23, u;
        mov.b64 {x01, x23}, $6;
        shr.u32 s, $1, 8;
        and.b32 t, s, 0x000F000F;
        fma.rn.f16x2 u, t, x01, u;
        and.b32 t, s, 0x00F000F0;
        fma.rn.f16x2 u, t, x23, u;
        mov.b64 {x01, x23}, $7;
        and.b32 t, $2, 0x000F000F;
        fma.rn.f16x2 u, t, x01, u;
        and.b32 t, $2, 0x00F000F0;
        fma.rn.f16x2 u, t, x23, u;
        mov.b64 {x01, x23}, $8;
        shr.u32 s, $2, 8;
        and.b32 t, s, 0x000F000F;
        fma.rn.f16x2 u, t, x01, u;
        and.b32 t, s, 0x00F000F0;
        fma.rn.f16x2 u, t, x23, u;
        mov.b64 {x01, x23}, $9;
        and.b32 t, $3, 0x000F000F;
        fma.rn.f16x2 u, t, x01, u;
        and.b32 t, $3, 0x00F000F0;
        fma.rn.f16x2 u, t, x23, u;
        mov.b64 {x01, x23}, $10;
        shr.u32 s, $3, 8;
        and.b32 t, s, 0x000F000F;
        fma.rn.f16x2 u, t, x01, u;
        and.b32 t, s, 0x00F000F0;
        fma.rn.f16x2 u, t, x23, u;
        mov.b64 {x01, x23}, $11;
        and.b32 t, $4, 0x000F000F;
        fma.rn.f16x2 u, t, x01, u;
        and.b32 t, $4, 0x00F000F0;
        fma.rn.f16x2 u, t, x23, u;
        mov.b64 {x01, x23}, $12;
        shr.u32 s, $4, 8;
        and.b32 t, s, 0x000F000F;
        fma.rn.f16x2 u, t, x01, u;
        and.b32 t, s, 0x00F000F0;
        fma.rn.f16x2 u, t, x23, u;
        mov.b32 {l, h}, u;
        cvt.f32.f16 a, l;
        cvt.f32.f16 b, h;
        add.f32 $0, a, b;
        }
        """,
        "=f,r,r,r,r,l,l,l,l,l,l,l,l",
        [w_0, w_1, w_2, w_3, a_0, b_0, a_1, b_1, a_2, b_2, a_3, b_3],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _half_product(word, x_03, x_47):
    """Of the lower halves."""
    acc = (word & 0xF).to(tl.float32) * _low(x_03)
    acc += (word & 0xF0).to(tl.float32) * _low(x_03 >> 32)
    acc += ((word >> 8) & 0xF).to(tl.float32) * _low(x_47)
    acc += ((word >> 8) & 0xF0).to(tl.float32) * _low(x_47 >> 32)
    return acc * 2.0**-24


@triton.jit
def _low(pairs):
    """The lowest of four float16 in an int64, float32."""
    return pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
