# mypy: allow-untyped-defs, no-check-untyped-defs
"""Words of 32 bits that ranks push into each other's memory, and their sums."""

import triton
import triton.language as tl

from reprise.distributed.symmetric import NOTHING
from reprise.ops.triton_util import depend

_NOTHING = tl.constexpr(NOTHING)


@triton.jit
def push_kernel(
    x_ptr, out_ptr, bases_ptr, turns_ptr, given_up_ptr, words,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program b sums the words of 32 bits from b * BLOCK on."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    index = program * BLOCK + lane
    here = index < words
    element: tl.constexpr = x_ptr.dtype.element_ty
    word: tl.constexpr = tl.pointer_type(tl.int32)
    x_words = x_ptr.to(word, bitcast=True)
    out_words = out_ptr.to(word, bitcast=True)
    depend(EARLY)
    turn = tl.load(turns_ptr + program)
    own = tl.load(x_words + index, mask=here, other=0)
    own = tl.where(own == _NOTHING, 0, own)
    place = ((turn & 1) * PROGRAMS + program) * (RANKS * SLOT // 4)
    for each in tl.static_range(RANKS):
        if each != RANK:
            base = tl.multiple_of(tl.load(bases_ptr + each).to(word), 16)
            theirs = base + place + RANK * (SLOT // 4) + lane
            tl.store(theirs, own, mask=here)
    if ADD:
        held = tl.load(out_words + index, mask=here, other=0)
    low = tl.zeros((BLOCK,), dtype=tl.float32)
    high = tl.zeros((BLOCK,), dtype=tl.float32)
    for each in tl.static_range(RANKS):
        found = own
        if each != RANK:
            base = tl.multiple_of(tl.load(bases_ptr + RANK).to(word), 16)
            slot = base + place + each * (SLOT // 4) + lane
            found = await_words(slot, here, given_up_ptr)
        a, b = halves(found, element)
        low += a
        high += b
    if ADD:
        a, b = halves(held, element)
        low = a + low.to(element).to(tl.float32)
        high = b + high.to(element).to(tl.float32)
    tl.store(out_words + index, words_of(low, high, element), mask=here)
    tl.store(turns_ptr + program, turn + 1)


@triton.jit
def await_words(slot, here, given_up_ptr):
    """Words that another rank writes to ``slot``, pointers in rows of 16 bytes, when all have come;
    "nothing" is put back in their place."""
    found = tl.load(slot, mask=here, other=0, volatile=True)
    missing = tl.max((found == _NOTHING).to(tl.int32), axis=0)
    while missing != 0:
        found = tl.load(slot, mask=here, other=0, volatile=True)
        missing = tl.max((found == _NOTHING).to(tl.int32), axis=0)
        missing = tl.where(tl.load(given_up_ptr, volatile=True) != 0, 0, missing)
    tl.debug_barrier()
    tl.store(slot, tl.full(found.shape, _NOTHING, tl.int32), mask=here)
    return found


@triton.jit
def halves(words, element: tl.constexpr):
    """The numbers in the lower and in the upper halves of words, float32; of words that are one
    number each: it, twice."""
    if element == tl.float32:
        low = words.to(tl.float32, bitcast=True)
        high = low
    else:
        low = (words & 0xFFFF).to(tl.int16).to(element, bitcast=True).to(tl.float32)
        high = ((words >> 16) & 0xFFFF).to(tl.int16).to(element, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def words_of(low, high, element: tl.constexpr):
    """The inverse: words of such numbers, rounded."""
    if element == tl.float32:
        found = low.to(tl.int32, bitcast=True)
    else:
        first = low.to(element).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        found = first | (high.to(element).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return found
