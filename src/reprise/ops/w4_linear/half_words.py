# mypy: allow-untyped-defs, no-check-untyped-defs
"""Words of four-bit numbers times a row in float16, two numbers an instruction.

A number under a mask is a float16 already, of the smallest: n * 2**-24 in its lower four bits, and
16 times that in the next four. Words hold neighbours a half apart, so a mask leaves two factors for
two neighbours of the row. These become float16 with a power of two for each 32 of them, which
leaves bfloat16 as it is (but for what is less than a 2**29th of the largest). The four products of
half a word are summed in float16, all else in float32.
"""

import triton
import triton.language as tl


@triton.jit
def halves(x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, PTX: tl.constexpr):
    """[W] eight times, float32 that bfloat16 holds: the inputs of words, in their order.

    Returns four of [W], pairs of neighbours that :func:`word_product` takes, and [W / 4] float32:
    what a sum of its products is to be multiplied by, and with 1024 besides.
    """
    WORDS: tl.constexpr = x_0.shape[0]
    low = tl.maximum(tl.maximum(tl.abs(x_0), tl.abs(x_1)), tl.maximum(tl.abs(x_2), tl.abs(x_3)))
    high = tl.maximum(tl.maximum(tl.abs(x_4), tl.abs(x_5)), tl.maximum(tl.abs(x_6), tl.abs(x_7)))
    most = tl.max(tl.reshape(tl.maximum(low, high), [WORDS // 4, 4]), axis=1)
    # Exponents, so that the largest is between 2**14 and 2**15.
    power = tl.maximum(most.to(tl.int32, bitcast=True) >> 23, 14)
    factor = ((268 - power) << 23).to(tl.float32, bitcast=True)
    factor = tl.reshape(tl.broadcast_to(factor[:, None], [WORDS // 4, 4]), [WORDS])
    x_01 = _pair(x_0 * factor, x_1 * factor, PTX)
    x_45 = _pair(x_4 * factor, x_5 * factor, PTX)
    factor *= 0.0625
    x_23 = _pair(x_2 * factor, x_3 * factor, PTX)
    x_67 = _pair(x_6 * factor, x_7 * factor, PTX)
    return x_01, x_23, x_45, x_67, (power << 23).to(tl.float32, bitcast=True)


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
def word_product(word, x_01, x_23, x_45, x_67, PTX: tl.constexpr):
    """[N, W] words times [W] four times, of :func:`halves`: [N, W] float32 of a 2**24th."""
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 s, t, u;
            .reg .b16 l, h;
            .reg .f32 a, b;
            and.b32 t, $1, 0x000F000F;
            mul.rn.f16x2 u, t, $2;
            and.b32 t, $1, 0x00F000F0;
            fma.rn.f16x2 u, t, $3, u;
            shr.u32 s, $1, 8;
            and.b32 t, s, 0x000F000F;
            fma.rn.f16x2 u, t, $4, u;
            and.b32 t, s, 0x00F000F0;
            fma.rn.f16x2 u, t, $5, u;
            mov.b32 {l, h}, u;
            cvt.f32.f16 a, l;
            cvt.f32.f16 b, h;
            add.f32 $0, a, b;
            }
            """,
            "=f,r,r,r,r,r",
            [word, x_01[None, :], x_23[None, :], x_45[None, :], x_67[None, :]],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    left = _half_product(word, x_01, x_23, x_45, x_67)
    return left + _half_product(word >> 16, x_01 >> 16, x_23 >> 16, x_45 >> 16, x_67 >> 16)


@triton.jit
def _half_product(word, x_01, x_23, x_45, x_67):
    """Of the lower halves."""
    acc = (word & 0xF).to(tl.float32) * _low(x_01)
    acc += (word & 0xF0).to(tl.float32) * _low(x_23)
    acc += ((word >> 8) & 0xF).to(tl.float32) * _low(x_45)
    acc += ((word >> 8) & 0xF0).to(tl.float32) * _low(x_67)
    return acc * 2.0**-24


@triton.jit
def _low(pair):
    """[W] int32 to its lower halves, [1, W] float32."""
    return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[None, :]
