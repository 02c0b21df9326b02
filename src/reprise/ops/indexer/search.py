# mypy: allow-untyped-defs, no-check-untyped-defs
"""Which number so many of a program's keys reach, found by counting those that reach eight at once.

A key is the int32 of a score: see :mod:`scores_kernel`. Keys that are not there are NONE.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(-0x80000000)
"""Below all keys."""


@triton.jit
def _larger_and_smaller(a, b, c, d):
    return tl.maximum(a, c), tl.minimum(b, d)


@triton.jit
def _reaching(keys, low, shift, NEAR: tl.constexpr):
    """How many reach ``low``, and numbers ``1 << shift`` apart from there on, eight in all: two in
    each of four words. What is counted fits half a word less a bit: see :data:`accepts.MOST`."""
    part = (keys - low).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    up_to = 0x11111111 >> (28 - tl.minimum(part, 7).to(tl.int32) * 4)
    one = tl.where(keys >= low, up_to, 0)
    FOURTH: tl.constexpr = one.shape[0] // 4
    if NEAR:
        four = tl.sum(tl.reshape(one, [FOURTH, 4]), axis=1)
    else:
        four = tl.sum(tl.reshape(one, [4, FOURTH]), axis=0)
    MASK: tl.constexpr = 0x000F000F
    # As one sum, not as four that are found together: a warp has an instruction for a sum of its
    # own, and none for several.
    both = tl.join(
        tl.join(four & MASK, four >> 4 & MASK), tl.join(four >> 8 & MASK, four >> 12 & MASK)
    )
    ab, cd = tl.split(tl.sum(both, axis=0))
    a, c = tl.split(ab)
    b, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def _many(a, b, c, d, least):
    """How many of the eight counts are ``least`` or more."""
    ADD = (0x8000 - least) * 0x00010001
    HALF: tl.constexpr = 0x00010001
    both = ((a + ADD >> 15 & HALF) + (b + ADD >> 15 & HALF)) + (
        (c + ADD >> 15 & HALF) + (d + ADD >> 15 & HALF)
    )
    return (both & 0xFF) + (both >> 16)


@triton.jit
def search(keys, low, shift, bounded, TOP: tl.constexpr, ENOUGH: tl.constexpr, NEAR: tl.constexpr):
    """A number that at least TOP and at most ENOUGH of ``keys`` reach, or, of equal ones, more; of
    fewer than TOP, one that all reach.

    Args:
        low: A guess: the number is looked for from here on,
        shift: in eight parts that are ``1 << shift`` wide, 29 at most, and below or above, in wider
            ones, if it is not there; then in the part that has it.
        bounded: Whether it is known to be below the end of these.

    Returns:
        It, the width of the last parts, and whether no more than ENOUGH reach it.
    """
    going, exact = shift >= 0, shift < 0
    while going:
        a, b, c, d = _reaching(keys, low, shift, NEAR)
        reach = _many(a, b, c, d, TOP)
        exact = _many(a, b, c, d, ENOUGH + 1) < reach
        bounded = bounded | (reach < 8) | (shift >= 29)
        narrower = (shift > 0) | (bounded == 0)
        going = (exact == 0) & tl.where(reach == 0, low > NONE + 1, narrower)
        if going:
            below = tl.minimum(shift + 3, 29)
            least = tl.maximum(low.to(tl.int64) - (7 << below.to(tl.int64)), NONE + 1)
            wider = (reach == 0) | (bounded == 0)
            low = tl.where(
                reach == 0, least.to(tl.int32), low + (tl.maximum(reach - 1, 0) << shift)
            )
            shift = tl.where(wider, below, tl.maximum(shift - 3, 0))
        else:
            low += tl.maximum(reach - 1, 0) << shift
    return low, shift, exact


@triton.jit
def bounds(keys, TOP: tl.constexpr):
    """Where the number that TOP of ``keys`` reach may be: the first of eight equal parts, and how
    wide they are."""
    high, low = tl.reduce((keys, tl.where(keys == NONE, 0x7FFFFFFF, keys)), 0, _larger_and_smaller)
    # Most often it is a quarter of the largest at least, or else not much less than nothing beside
    # it: ranges that eight parts fill.
    quarter = tl.maximum(high.to(tl.int64) - ((1 << 24) - 1), low.to(tl.int64)).to(tl.int32)
    small = tl.maximum(high.to(tl.int64) - ((1 << 27) - 1), low.to(tl.int64)).to(tl.int32)
    both = (keys >= quarter).to(tl.int32) + ((keys >= small).to(tl.int32) << 16)
    reached = tl.sum(both, axis=0)
    low = tl.where((reached >> 16 & 0xFFFF) >= TOP, small, low)
    low = tl.where((reached & 0xFFFF) >= TOP, quarter, low)
    span = high.to(tl.int64) - low.to(tl.int64)
    shift = low * 0
    for bits in tl.static_range(3, 33, 3):
        shift = tl.where((span >> bits) != 0, bits, shift)
    return low, tl.minimum(shift, 29)


@triton.jit
def largest(keys, low, shift, bounded, TOP: tl.constexpr, NEAR: tl.constexpr):
    """Which TOP of ``keys`` are the largest, of equal ones the first; TOP are there at least. And
    the number that these reach."""
    low, _, exact = search(keys, low, shift, bounded, TOP, TOP, NEAR)
    taken = keys >= low
    if exact == 0:
        above = tl.sum((keys > low).to(tl.int32), axis=0)
        equal = (keys == low).to(tl.int32)
        taken = (keys > low) | ((equal != 0) & (tl.cumsum(equal, axis=0) <= TOP - above))
    return taken, low
