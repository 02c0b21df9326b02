# mypy: allow-untyped-defs, no-check-untyped-defs
"""The indexer's choice: of a token's scores the largest, found by cutting the range of their bits.

Where a token sees many rows, programs choose of a chunk each, and another kernel of what these
chose. Rows of which one is the largest of its group are as many as groups: so many as are asked for
reach what so many largest ones reach, and of a chunk no row below that is needed.
"""

import triton
import triton.language as tl

from reprise.ops.indexer.search import NONE, bounds, largest, search
from reprise.ops.request_of import request_of
from reprise.ops.triton_util import depend

_GUESS = tl.constexpr(20)
_HALF = tl.constexpr(4 << 20)
"""Where some score is known, what so many reach is looked for from this much below it to this much
above, in parts of ``1 << _GUESS``: of float32 they are an eighth of a power of two."""


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
    left_ptr,
    found_ptr,
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
    SEVERAL: tl.constexpr,
    GROUP: tl.constexpr,
    PEAKS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program chooses of a chunk of a token's scores.

    A token with one chunk, or none, is done at once. Of others each chunk leaves scores and numbers
    of at most TOP rows, in the order of the rows, in ``left`` [T, chunks, 2, TOP], and in ``found``
    [T, 3, chunks] how many, and what it found out of the score that all that are chosen reach: a
    number that it is not below, and in parts of which width to look from there on.

    SEVERAL: whether a token may have several. GROUP: rows of each of at most PEAKS ``peaks``; 0:
    there are none.
    """
    here = tl.program_id(0)
    token = (first + here).to(tl.int64)
    chunk = tl.program_id(1)
    request, position = request_of(token, seq_lens_ptr, starts_ptr, requests, BLOCK_R)
    count = tl.minimum((position + 1) // EVERY, room).to(tl.int32)
    tables = table_ptr + request.to(tl.int64) * table_stride
    target = out_ptr + token * out_stride
    place = tl.arange(0, CHUNK)
    number = chunk * CHUNK + place
    many = tl.minimum(CHUNK, count - chunk * CHUNK)
    depend(EARLY)
    if (chunk > 0) & (many <= 0):
        return
    keys = tl.load(scores_ptr + here.to(tl.int64) * room + number, mask=number < count, other=NONE)
    low, width = many * 0 + (NONE + 1), many * 0 + 29
    known = many < 0
    if GROUP > 0:
        groups = tl.cdiv(count, GROUP)
        if (groups > TOP) & (count > CHUNK):
            group = tl.arange(0, PEAKS)
            peaks = peaks_ptr + here.to(tl.int64) * tl.cdiv(room, GROUP)
            some = tl.load(peaks + groups // 2)
            peak = tl.load(peaks + group, mask=group < groups, other=NONE)
            least = tl.maximum(some.to(tl.int64) - _HALF, NONE + 1).to(tl.int32)
            low, width, _ = search(
                peak, least, width * 0 + _GUESS, known, TOP, TOP + TOP // 4, False
            )
            keys = tl.where(keys >= low, keys, NONE)
            many = tl.sum((keys != NONE).to(tl.int32), axis=0)
            known = many >= 0
    taken = keys != NONE
    if many > TOP:
        shift = width
        if known == 0:
            low, shift = bounds(keys, TOP)
            width = width * 0 + _GUESS
        taken, low = largest(keys, low, shift, known == 0, TOP, True)
        many = many * 0 + TOP
    if (SEVERAL == 0) | (count <= CHUNK):
        _write(target, tables, number, taken, out_place_stride, BLOCK)
        # Behind them nobody's rows; a chunk is as wide as TOP at least.
        behind = (place >= many) & (place < TOP)
        tl.store(target + place * out_place_stride, tl.zeros([CHUNK], dtype=tl.int32), mask=behind)
    elif SEVERAL:
        left = left_ptr + (here.to(tl.int64) * chunks + chunk) * (2 * TOP)
        rank = tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(left + rank, keys, mask=taken)
        tl.store(left + TOP + rank, number, mask=taken)
        found = found_ptr + here.to(tl.int64) * (3 * chunks) + chunk
        tl.store(found, many)
        tl.store(found + chunks, low)
        tl.store(found + 2 * chunks, tl.minimum(width + 1, 29))


@triton.jit
def _choose_of_few(
    left, found, target, tables, used, low, shift, place_stride, SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of what all chunks have left, where that is at most SLOTS, one behind the other."""
    slot = tl.arange(0, SLOTS)
    place, end = slot, tl.load(found)
    for chunk in tl.static_range(1, CHUNKS):
        place = tl.where(slot >= end, slot - end + chunk * (2 * TOP), place)
        end += tl.load(found + chunk, mask=chunk < used, other=0)
    keys = tl.load(left + place, mask=slot < end, other=NONE)
    # Asked for before the search, which they need not wait for.
    number = tl.load(left + TOP + place, mask=slot < end, other=0)
    block = tl.load(tables + number // BLOCK, mask=slot < end, other=0)
    taken, _ = largest(keys, low, shift, shift < 0, TOP, False)
    rank = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(target + rank * place_stride, block * BLOCK + number % BLOCK, mask=taken)


@triton.jit
def _left_of(left, found, used, slot, TOP: tl.constexpr):
    """Scores in places for TOP of each chunk, and where these are. Not masked: a device with few
    registers for masks has no room for so many."""
    each = tl.load(found + slot // TOP)
    place = slot // TOP * (2 * TOP) + slot % TOP
    real = (slot < used * TOP) & (slot % TOP < each)
    return tl.where(real, tl.load(left + place), NONE), place


@triton.jit
def _choose_of_all(
    left, found, target, tables, used, low, shift, place_stride, MOST: tl.constexpr,
    PART: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of what all chunks have left, with room for as many as they can have; written in parts."""
    keys, _ = _left_of(left, found, used, tl.arange(0, MOST), TOP)
    low, shift, exact = search(keys, low, shift, shift < 0, TOP, TOP, True)
    wanted = used * TOP
    if exact == 0:
        wanted = TOP - tl.sum((keys > low).to(tl.int32), axis=0)
    begin, equals = used * 0, used * 0
    for first in range(0, used * TOP, PART):
        some, place = _left_of(left, found, used, first + tl.arange(0, PART), TOP)
        equal = (some == low).to(tl.int32)
        taken = (some >= low).to(tl.int32)
        if exact == 0:
            taken -= equal * (equals + tl.cumsum(equal, axis=0) > wanted).to(tl.int32)
            equals += tl.sum(equal, axis=0)
        rank = begin + tl.cumsum(taken, axis=0) - 1
        number = tl.where(taken != 0, tl.load(left + TOP + place), 0)
        block = tl.load(tables + number // BLOCK)
        tl.store(target + rank * place_stride, block * BLOCK + number % BLOCK, mask=taken != 0)
        begin += tl.sum(taken, axis=0)


@triton.jit(do_not_specialize=["requests", "first", "chunks"])
def index_last_kernel(
    table_ptr,
    out_ptr,
    left_ptr,
    found_ptr,
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
    CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr,
    MOST: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program chooses of what the CHUNKS of a token have left, for which there is room MOST,
    a whole number of PART; most often it is SLOTS at most."""
    here = tl.program_id(0)
    token = (first + here).to(tl.int64)
    request, position = request_of(token, seq_lens_ptr, starts_ptr, requests, BLOCK_R)
    count = tl.minimum((position + 1) // EVERY, room).to(tl.int32)
    tables = table_ptr + request.to(tl.int64) * table_stride
    target = out_ptr + token * out_stride
    used = tl.cdiv(count, CHUNK)
    left = left_ptr + here.to(tl.int64) * chunks * (2 * TOP)
    found = found_ptr + here.to(tl.int64) * (3 * chunks)
    depend(EARLY)
    if used <= 1:
        return
    chunk = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(found + chunk, mask=chunk < used, other=0), axis=0)
    low = tl.max(tl.load(found + chunks + chunk, mask=chunk < used, other=NONE), axis=0)
    shift = tl.max(tl.load(found + 2 * chunks + chunk, mask=chunk < used, other=0), axis=0)
    if total <= SLOTS:
        _choose_of_few(
            left, found, target, tables, used, low, shift, out_place_stride, SLOTS, CHUNKS, TOP,
            BLOCK,
        )  # fmt: skip
    else:
        _choose_of_all(
            left, found, target, tables, used, low, shift, out_place_stride, MOST, PART, TOP,
            BLOCK,
        )  # fmt: skip
