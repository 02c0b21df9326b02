# mypy: allow-untyped-defs, no-check-untyped-defs
"""The rotation of the last channels of heads, for kernels."""

import triton
import triton.language as tl


@triton.jit
def turn(x, angle_ptr, end, HALF: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """x: [ROWS, BLOCK] float32, of which the pairs of neighbours in the 2 * HALF channels before
    ``end`` rotate by the angles whose cosines and then sines stand at ``angle_ptr``."""
    ROWS: tl.constexpr = x.shape[0]
    pair = tl.arange(0, BLOCK // 2)[None, :]
    number = pair - (end // 2 - HALF)
    rotates = (number >= 0) & (number < HALF)
    cos = tl.load(angle_ptr + number, mask=rotates, other=1.0)
    sin = tl.load(angle_ptr + HALF + number, mask=rotates, other=0.0)
    if BACK:
        sin = -sin
    even, odd = tl.split(tl.reshape(x, [ROWS, BLOCK // 2, 2]))
    first = tl.where(rotates, even * cos - odd * sin, even)
    second = tl.where(rotates, odd * cos + even * sin, odd)
    return tl.reshape(tl.join(first, second), [ROWS, BLOCK])
