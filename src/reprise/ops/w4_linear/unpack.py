# mypy: allow-untyped-defs, no-check-untyped-defs
"""Words of eight numbers of four bits made numbers, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ordered(pairs_0, pairs_1, pairs_2, pairs_3):
    """Of four times two halves of words [N, W]: [N, 8 * W] int16, one half behind the other."""
    pairs = tl.join(tl.join(pairs_0, pairs_2), tl.join(pairs_1, pairs_3))
    low, high = (pairs & 0xFFFF).to(tl.int16), ((pairs >> 16) & 0xFFFF).to(tl.int16)
    return tl.reshape(tl.join(low, high), [pairs_0.shape[0], pairs_0.shape[1] * 8])


@triton.jit
def unpacked(word):
    """[N, W] words to [N, 8 * W] int16 from 0 to 15, in the order of the inputs."""
    mask: tl.constexpr = 0x000F000F
    return _ordered(word & mask, (word >> 4) & mask, (word >> 8) & mask, (word >> 12) & mask)


@triton.jit
def unpacked_above(word, kind: tl.constexpr):
    """The same in ``kind``: 128 + number in bfloat16, 1024 + number in float16, which takes two
    operations for two numbers."""
    mask: tl.constexpr = 0x000F000F
    above: tl.constexpr = 0x43004300 if kind == tl.bfloat16 else 0x64006400
    return _ordered(
        (word & mask) | above,
        ((word >> 4) & mask) | above,
        ((word >> 8) & mask) | above,
        ((word >> 12) & mask) | above,
    ).to(kind, bitcast=True)
