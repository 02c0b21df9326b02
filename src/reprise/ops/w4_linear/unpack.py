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
