# mypy: allow-untyped-defs, no-check-untyped-defs
"""The indexer's choice: of a token's scores the largest, found by cutting the range of their bits.

Where a token sees many rows, programs choose of a chunk each, and the last of them of what these
chose. Rows of which one is the largest of its group are as many as groups: so many as are asked for
reach what so many largest ones reach, and of a chunk no row below that is needed.
"""

import triton
import triton.language as tl

from reprise.ops.request_of import request_of
from reprise.ops.triton_util import depend

NONE = tl.constexpr(-0x80000000)
"""Below all keys."""


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _sums(a, b, c, d):
    """One of each, found together."""
    return tl.reduce((a, b, c, d), 0, _add_four)


@triton.jit
def _larger_and_smaller(a, b, c, d):
    return tl.maximum(a, c), tl.minimum(b, d)


@triton.jit
def _least(reach, TOP: tl.constexpr):
    """It, if TOP or more reach a part."""
    return tl.where(reach >= TOP, reach, 0x7FFFFFFF)


@triton.jit
def _most(reach, TOP: tl.constexpr):
    """It, if less than TOP reach a part."""
    return tl.where(reach < TOP, reach, 0)


@triton.jit
def _search(keys, TOP: tl.constexpr, ENOUGH: tl.constexpr):
    """Which number at least TOP and at most ENOUGH of ``keys`` reach, or, of equal ones, more. TOP
    are there at least; those that are not are NONE.

    It is looked for in eight equal parts of a range at once, and then in the part that has it. What
    is counted fits half a word: see :data:`accepts.MOST`.

    Returns:
        The keys, of which those that reach it are what they were; it; how many reach it; and, if
        these are too many, how many are larger.
    """
    high, low = tl.reduce((keys, tl.where(keys == NONE, 0x7FFFFFFF, keys)), 0, _larger_and_smaller)
    # Those that are not there are below the smallest one, which is reached by all others.
    low -= 1
    # Most often it is a quarter of the largest at least, or else not much less than nothing beside
    # it: ranges that eight parts fill.
    quarter = tl.maximum(high.to(tl.int64) - ((1 << 24) - 2), low.to(tl.int64) + 1).to(tl.int32)
    small = tl.maximum(high.to(tl.int64) - ((1 << 27) - 2), low.to(tl.int64) + 1).to(tl.int32)
    both = (keys >= quarter).to(tl.int32) + ((keys >= small).to(tl.int32) << 16)
    reached = tl.sum(both, axis=0)
    low = tl.where((reached >> 16 & 0xFFFF) >= TOP, small - 1, low)
    low = tl.where((reached & 0xFFFF) >= TOP, quarter - 1, low)
    keys = tl.maximum(keys, low)
    span = high.to(tl.int64) - low.to(tl.int64)
    shift = low * 0
    for bits in tl.static_range(3, 33, 3):
        shift = tl.where((span >> bits) != 0, bits, shift)
    above, reach = low * 0, low * 0 + 0x7FFFFFFF
    while (shift >= 0) & (reach > ENOUGH):
        # Of smaller keys, which wrap around, it is at least 8: ``low`` has gone up by whole ranges.
        part = (keys - low).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        one = tl.where(part < 8, 1 << (part & 7).to(tl.int32) * 4, 0)
        four = tl.sum(tl.reshape(one, [one.shape[0] // 4, 4]), axis=1)
        MASK: tl.constexpr = 0x000F000F
        a, b, c, d = _sums(four & MASK, four >> 4 & MASK, four >> 8 & MASK, four >> 12 & MASK)
        # Keys that reach each part, from the last one on; few steps wait for each other.
        upper = (d >> 16 & 0xFFFF) + (c >> 16 & 0xFFFF)
        lower = (d & 0xFFFF) + (c & 0xFFFF)
        r7 = above + (d >> 16 & 0xFFFF)
        r6 = above + upper
        r5 = r6 + (b >> 16 & 0xFFFF)
        r4 = r5 + (a >> 16 & 0xFFFF)
        r3 = r4 + (d & 0xFFFF)
        r2 = r4 + lower
        r1 = r2 + (b & 0xFFFF)
        r0 = r1 + (a & 0xFFFF)
        which = ((r1 >= TOP).to(tl.int32) + (r2 >= TOP).to(tl.int32)) + (
            (r3 >= TOP).to(tl.int32) + (r4 >= TOP).to(tl.int32)
        )
        which += ((r5 >= TOP).to(tl.int32) + (r6 >= TOP).to(tl.int32)) + (r7 >= TOP).to(tl.int32)
        reach = tl.minimum(
            tl.minimum(
                tl.minimum(r0, _least(r1, TOP)), tl.minimum(_least(r2, TOP), _least(r3, TOP))
            ),
            tl.minimum(
                tl.minimum(_least(r4, TOP), _least(r5, TOP)),
                tl.minimum(_least(r6, TOP), _least(r7, TOP)),
            ),
        )
        above = tl.maximum(
            tl.maximum(
                tl.maximum(_most(r1, TOP), _most(r2, TOP)),
                tl.maximum(_most(r3, TOP), _most(r4, TOP)),
            ),
            tl.maximum(
                tl.maximum(_most(r5, TOP), _most(r6, TOP)), tl.maximum(_most(r7, TOP), above)
            ),
        )
        low += which << shift
        shift -= 3
    return keys, low, reach, above


@triton.jit
def _largest(keys, TOP: tl.constexpr):
    """Which TOP of ``keys`` are the largest, of equal ones the first; TOP are there at least. And
    the keys, of which those that are taken are what they were."""
    keys, low, reach, above = _search(keys, TOP, TOP)
    if reach != TOP:
        equal = keys == low
        behind = tl.cumsum(equal.to(tl.int32), axis=0) > TOP - above
        keys -= (equal & behind).to(tl.int32)
    return keys >= low, keys


@triton.jit
def _arrived(arrivals_ptr, count, level):
    """As :func:`is_last`; and the sum of all ``level``."""
    tl.debug_barrier()
    mine = 1 + (level << 16)
    arrived = tl.atomic_add(arrivals_ptr, mine, sem="acq_rel") + mine
    last = (arrived & 0xFFFF) == count
    if last:
        tl.store(arrivals_ptr, 0)
    return last, arrived >> 16


@triton.jit
def _choose_of_all(
    best, target, tables, chunks, place_stride, SLOTS: tl.constexpr, EACH: tl.constexpr,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the first EACH that every chunk has left."""
    slot = tl.arange(0, SLOTS)
    place = slot // EACH * (2 * TOP) + slot % EACH
    keys = tl.load(best + place, mask=slot < chunks * EACH, other=NONE)
    chosen, _ = _largest(keys, TOP)
    number = tl.load(best + TOP + place, mask=chosen, other=0)
    _write(target, tables, number, chosen, place_stride, BLOCK)


@triton.jit
def _write(target, tables, number, taken, place_stride, BLOCK: tl.constexpr):
    """The rows that are taken, in their order."""
    rank = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    block = tl.load(tables + number // BLOCK, mask=taken, other=0)
    tl.store(target + rank * place_stride, block * BLOCK + number % BLOCK, mask=taken)


@triton.jit(do_not_specialize=["requests", "first", "chunks"])
def index_top_kernel(
    scores_ptr,
    peaks_ptr,
    table_ptr,
    out_ptr,
    best_ptr,
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
    FEW: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    PEAKS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program chooses of a chunk of a token's scores.

    A token with one chunk, or none, is done at once. Of others each chunk leaves scores and numbers
    of at most TOP rows, in the order of the rows, in ``best`` [T, chunks, 2, TOP], and the last
    program chooses of these, of FEW of each if no chunk has left more, or twice as many. MERGED and
    SLOTS: powers of two, as many as are all these and those few at least; 0: there is one chunk,
    and all are chosen from. GROUP: rows of each of at most PEAKS ``peaks``; 0: there are none.
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
    scores = scores_ptr + here.to(tl.int64) * room
    keys = tl.load(scores + number, mask=number < count, other=NONE)
    many = tl.minimum(CHUNK, count - chunk * CHUNK).to(tl.int32)
    if GROUP > 0:
        groups = tl.cdiv(count, GROUP)
        if (groups > TOP) & (count > CHUNK):
            group = tl.arange(0, PEAKS)
            peaks = peaks_ptr + here.to(tl.int64) * tl.cdiv(room, GROUP)
            peak = tl.load(peaks + group, mask=group < groups, other=NONE)
            _, low, _, _ = _search(peak, TOP, TOP + TOP // 4)
            keys = tl.where(keys >= low, keys, NONE)
            many = tl.sum((keys != NONE).to(tl.int32), axis=0)
    taken = keys != NONE
    if many > TOP:
        taken, keys = _largest(keys, TOP)
        many = many * 0 + TOP
    if (MERGED == 0) | (count <= CHUNK):
        _write(target, tables, number, taken, out_place_stride, BLOCK)
        # Behind them nobody's rows; a chunk is as wide as TOP at least.
        behind = (place >= many) & (place < TOP)
        tl.store(target + place * out_place_stride, tl.zeros([CHUNK], dtype=tl.int32), mask=behind)
    elif MERGED > 0:
        best = best_ptr + here.to(tl.int64) * chunks * (2 * TOP)
        ours = best + chunk * (2 * TOP)
        rank = tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(ours + rank, keys, mask=taken)
        tl.store(ours + TOP + rank, number, mask=taken)
        nothing = tl.full([CHUNK], NONE, dtype=tl.int32)
        tl.store(ours + place, nothing, mask=(place >= many) & (place < TOP))
        used = tl.cdiv(count, CHUNK)
        # All chunks with more than FEW count less than one with more than twice as many.
        level = (many > FEW).to(tl.int32) + ((many > 2 * FEW).to(tl.int32) << 6)
        last, levels = _arrived(arrivals_ptr + here, used, level)
        if last:
            if (SLOTS == 0) | (levels >= (64 if 2 * FEW < TOP else 1)):
                _choose_of_all(
                    best, target, tables, used, out_place_stride, MERGED, TOP, TOP, BLOCK
                )
            elif SLOTS > 0:
                if levels > 0:
                    _choose_of_all(
                        best, target, tables, used, out_place_stride, 2 * SLOTS, 2 * FEW, TOP, BLOCK
                    )
                else:
                    _choose_of_all(
                        best, target, tables, used, out_place_stride, SLOTS, FEW, TOP, BLOCK
                    )
