# mypy: allow-untyped-defs, no-check-untyped-defs
"""The indexer's choice: of a token's scores the largest, found by halving the range of their bits.

Where a token sees many rows, first each chunk's largest are found, then those of all chunks, by the
last of the programs: rows that are not among their chunk's are not among all.
"""

import triton
import triton.language as tl

from reprise.ops.request_of import request_of
from reprise.ops.triton_util import depend, is_last


@triton.jit
def _order(x):
    """int32 in the order of float32, above the smallest one: NaN as the largest, both zeros the
    same."""
    x = tl.where(x != x, float("inf"), tl.where(x == 0, 0.0, x))
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _sums(a, b, c, d):
    """One of each, found together."""
    return tl.reduce((a, b, c, d), 0, _add_four)


@triton.jit
def _better(part: tl.constexpr, reach, over, which, reached, above, TOP: tl.constexpr):
    """A part, how many keys reach it and how many the next one, if TOP do; else those of before."""
    enough = reach >= TOP
    return (
        tl.where(enough, part, which),
        tl.where(enough, reach, reached),
        tl.where(enough, over, above),
    )


@triton.jit
def _largest(keys, real, TOP: tl.constexpr):
    """Which TOP of ``keys`` are the largest, of equal ones the first; there are more than TOP.

    The TOP-th largest is looked for in eight equal parts of a range at once, and then in the part
    that has it. What is counted fits half a word: see :data:`accepts.MOST`.
    """
    low = tl.min(tl.where(real, keys, 0x7FFFFFFF), axis=0)
    high = tl.max(tl.where(real, keys, -0x7FFFFFFF), axis=0)
    # Those that are not there are as small as the smallest one: of more than TOP it is the last.
    keys = tl.where(real, keys, low)
    # Most often it is a sixteenth of the largest at least, where the range is a small one.
    near = tl.maximum(high.to(tl.int64) - (1 << 25), low.to(tl.int64) + 1).to(tl.int32)
    enough = tl.sum((keys >= near).to(tl.int32), axis=0) >= TOP
    low = tl.where(enough, near - 1, low)
    keys = tl.maximum(keys, low)
    span = high.to(tl.int64) - low.to(tl.int64)
    shift = low * 0
    for bits in tl.static_range(3, 33, 3):
        shift = tl.where((span >> bits) != 0, bits, shift)
    above, reach = low * 0, low * 0 + (TOP + 1)
    while (shift >= 0) & (reach != TOP):
        # Of smaller keys, which wrap around, it is at least 8: ``low`` has gone up by whole ranges.
        part = (keys - low).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        one = tl.where(part < 8, 1 << (part & 7).to(tl.int32) * 4, 0)
        four = tl.sum(tl.reshape(one, [one.shape[0] // 4, 4]), axis=1)
        MASK: tl.constexpr = 0x000F000F
        a, b, c, d = _sums(four & MASK, four >> 4 & MASK, four >> 8 & MASK, four >> 12 & MASK)
        # Keys that reach each part, from the last one on.
        r7 = above + (d >> 16 & 0xFFFF)
        r6 = r7 + (c >> 16 & 0xFFFF)
        r5 = r6 + (b >> 16 & 0xFFFF)
        r4 = r5 + (a >> 16 & 0xFFFF)
        r3 = r4 + (d & 0xFFFF)
        r2 = r3 + (c & 0xFFFF)
        r1 = r2 + (b & 0xFFFF)
        r0 = r1 + (a & 0xFFFF)
        which, reach, over = shift * 0, r0, r1
        which, reach, over = _better(1, r1, r2, which, reach, over, TOP)
        which, reach, over = _better(2, r2, r3, which, reach, over, TOP)
        which, reach, over = _better(3, r3, r4, which, reach, over, TOP)
        which, reach, over = _better(4, r4, r5, which, reach, over, TOP)
        which, reach, over = _better(5, r5, r6, which, reach, over, TOP)
        which, reach, over = _better(6, r6, r7, which, reach, over, TOP)
        which, reach, over = _better(7, r7, above, which, reach, over, TOP)
        above = over
        low += which << shift
        shift -= 3
    taken = real & (keys >= low)
    if reach != TOP:
        equal = real & (keys == low)
        taken = taken & ((keys > low) | (tl.cumsum(equal.to(tl.int32), axis=0) <= TOP - above))
    return taken


@triton.jit
def _write(target, tables, number, taken, place_stride, BLOCK: tl.constexpr):
    """The rows that are taken, in their order."""
    rank = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    block = tl.load(tables + number // BLOCK, mask=taken, other=0)
    tl.store(target + rank * place_stride, block * BLOCK + number % BLOCK, mask=taken)


@triton.jit(do_not_specialize=["requests", "first", "chunks"])
def index_top_kernel(
    scores_ptr,
    table_ptr,
    out_ptr,
    best_ptr,
    numbers_ptr,
    arrivals_ptr,
    seq_lens_ptr,
    starts_ptr,
    requests,
    first,
    room,
    chunks,
    table_stride,
    out_stride,
    out_place_stride,
    TOP: tl.constexpr,
    CHUNK: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program chooses of a chunk of a token's scores.

    A token with one chunk, or none, is done at once. Of others each chunk leaves scores and numbers
    of at most TOP rows, in the order of the rows, in ``best`` and ``numbers`` [T, chunks, TOP], and
    the last program chooses of these. MERGED: their number, at least; 0: there is one chunk.
    """
    here = tl.program_id(0)
    token = (first + here).to(tl.int64)
    chunk = tl.program_id(1)
    request, position = request_of(token, seq_lens_ptr, starts_ptr, requests, BLOCK_R)
    count = tl.minimum((position + 1) // EVERY, room)
    tables = table_ptr + request.to(tl.int64) * table_stride
    target = out_ptr + token * out_stride
    depend(EARLY)
    if (chunk > 0) & (chunk * CHUNK >= count):
        return
    place = tl.arange(0, CHUNK)
    number = chunk * CHUNK + place
    real = number < count
    scores = tl.load(scores_ptr + here.to(tl.int64) * room + number, mask=real, other=0.0)
    many = tl.minimum(CHUNK, count - chunk * CHUNK)
    taken = real
    if many > TOP:
        taken = _largest(_order(scores), real, TOP)
    if (MERGED == 0) | (count <= CHUNK):
        _write(target, tables, number, taken, out_place_stride, BLOCK)
        # Behind them nobody's rows; a chunk is as wide as TOP at least.
        behind = (place >= many) & (place < TOP)
        tl.store(target + place * out_place_stride, tl.zeros([CHUNK], dtype=tl.int32), mask=behind)
    elif MERGED > 0:
        kept = here.to(tl.int64) * chunks * TOP
        rank = chunk * TOP + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(best_ptr + kept + rank, scores, mask=taken)
        tl.store(numbers_ptr + kept + rank, number, mask=taken)
        if is_last(arrivals_ptr + here, tl.cdiv(count, CHUNK)):
            each = tl.arange(0, MERGED)
            there = (each < chunks * TOP) & (each % TOP < count - each // TOP * CHUNK)
            left = tl.load(best_ptr + kept + each, mask=there, other=0.0)
            numbers = tl.load(numbers_ptr + kept + each, mask=there, other=0)
            chosen = _largest(_order(left), there, TOP)
            _write(target, tables, numbers, chosen, out_place_stride, BLOCK)
