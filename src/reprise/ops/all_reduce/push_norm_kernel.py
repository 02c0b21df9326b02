# mypy: allow-untyped-defs, no-check-untyped-defs
"""Rows that ranks push into each other's memory: their sums, added to the residual stream, and the
root mean square norm of that."""

import triton
import triton.language as tl

from reprise.distributed.symmetric import NOTHING
from reprise.ops.all_reduce.push_kernel import await_words, halves, words_of
from reprise.ops.triton_util import depend, with_gain

_NOTHING = tl.constexpr(NOTHING)


@triton.jit
def push_norm_kernel(
    x_ptr, residual_ptr, gain_ptr, out_ptr, bases_ptr, turns_ptr, given_up_ptr, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr, PROGRAMS: tl.constexpr,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program r sums row r, of WORDS words of 32 bits, through a slot for each PART of them."""
    PARTS: tl.constexpr = (WORDS + PART - 1) // PART
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    here = lane < WORDS
    element: tl.constexpr = x_ptr.dtype.element_ty
    word: tl.constexpr = tl.pointer_type(tl.int32)
    EACH: tl.constexpr = 4 // (element.primitive_bitwidth // 8)
    number = tl.arange(0, BLOCK * EACH)
    gains = tl.load(gain_ptr + number, mask=number < WORDS * EACH, other=0)
    if EACH == 2:
        low_gain, high_gain = tl.split(tl.reshape(gains, [BLOCK, 2]))
    else:
        low_gain, high_gain = gains, gains
    depend(EARLY)
    if PARTS == 1:
        slot = row
        turn = tl.load(turns_ptr + slot)
    else:
        slot = row * PARTS + lane // PART
        turn = tl.load(turns_ptr + slot, mask=here, other=0)
    own = tl.load(x_ptr.to(word, bitcast=True) + row * WORDS + lane, mask=here, other=0)
    own = tl.where(own == _NOTHING, 0, own)
    place = ((turn & 1) * PROGRAMS + slot) * (RANKS * SLOT // 4) + lane % PART
    for each in tl.static_range(RANKS):
        if each != RANK:
            theirs = tl.multiple_of(tl.load(bases_ptr + each).to(word), 16)
            tl.store(theirs + place + RANK * (SLOT // 4), own, mask=here)
    residual_words = residual_ptr.to(word, bitcast=True) + row * WORDS + lane
    held = tl.load(residual_words, mask=here, other=0)
    low = tl.zeros((BLOCK,), dtype=tl.float32)
    high = tl.zeros((BLOCK,), dtype=tl.float32)
    for each in tl.static_range(RANKS):
        found = own
        if each != RANK:
            ours = tl.multiple_of(tl.load(bases_ptr + RANK).to(word), 16)
            found = await_words(ours + place + each * (SLOT // 4), here, given_up_ptr)
        a, b = halves(found, element)
        low += a
        high += b
    a, b = halves(held, element)
    # Rounded where an op of its own would round: the norm is of what the stream holds.
    low = (a + low.to(element).to(tl.float32)).to(element).to(tl.float32)
    high = (b + high.to(element).to(tl.float32)).to(element).to(tl.float32)
    tl.store(residual_words, words_of(low, high, element), mask=here)
    squares = low * low
    if EACH == 2:
        squares += high * high
    scale = tl.rsqrt(tl.sum(squares, axis=0) / (WORDS * EACH) + eps)
    low = with_gain(low * scale, low_gain, element)
    high = with_gain(high * scale, high_gain, element)
    out_words = out_ptr.to(word, bitcast=True) + row * WORDS + lane
    tl.store(out_words, words_of(low, high, element), mask=here)
    if PARTS == 1:
        tl.store(turns_ptr + slot, turn + 1)
    else:
        tl.store(turns_ptr + slot, turn + 1, mask=here & (lane % PART == 0))
