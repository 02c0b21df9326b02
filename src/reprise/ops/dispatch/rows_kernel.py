# mypy: allow-untyped-defs, no-check-untyped-defs
"""Rows that ranks push to where their experts are, and sums of what comes back."""

import triton
import triton.language as tl

from reprise.distributed.symmetric import NOTHING
from reprise.ops.all_reduce.push_kernel import await_words, halves, words_of
from reprise.ops.triton_util import depend

_NOTHING = tl.constexpr(NOTHING)


@triton.jit(do_not_specialize=["count", "first"])
def dispatch_kernel(
    x_ptr, weights_ptr, ids_ptr, rows_ptr, rows_weights_ptr, rows_ids_ptr,
    bases_ptr, turns_ptr, given_up_ptr, count, first,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr, PROGRAMS: tl.constexpr,
    ROUTES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, TOP: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program r sends this rank's row r, and takes row r of each other rank."""
    word: tl.constexpr = tl.pointer_type(tl.int32)
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    here = lane < WORDS
    top = tl.arange(0, TOP)
    among = top < K
    rows_words = rows_ptr.to(word, bitcast=True)
    rows_weights_words = rows_weights_ptr.to(word, bitcast=True)
    depend(EARLY)
    turn = tl.load(turns_ptr + row)
    place = ((turn & 1) * PROGRAMS + row) * (RANKS * SLOT // 4)
    ids = tl.load(ids_ptr + row * K + top, mask=among, other=-1)
    weights = tl.load(weights_ptr.to(word, bitcast=True) + row * K + top, mask=among, other=0)
    weights = tl.where(weights == _NOTHING, 0, weights)
    x = tl.load(x_ptr.to(word, bitcast=True) + row * WORDS + lane, mask=here, other=0)
    x = tl.where(x == _NOTHING, 0, x)
    for each in tl.static_range(RANKS):
        if each != RANK:
            theirs = tl.multiple_of(tl.load(bases_ptr + each).to(word), 16)
            theirs = theirs + place + RANK * (SLOT // 4)
            tl.store(theirs + ROUTES + top, ids, mask=among)
            tl.store(theirs + ROUTES + TOP + top, weights, mask=among)
            wanted = _any_of(ids, first + (each - RANK) * STRIDE, COUNT)
            tl.store(theirs + lane, x, mask=tl.where(here, wanted, 0) != 0)
    for each in tl.static_range(RANKS):
        place_of_row = (each * count + row).to(tl.int64)
        if each == RANK:
            found, found_ids, found_weights = x, ids, weights
            wanted = _any_of(ids, first, COUNT)
        else:
            slot = tl.multiple_of(tl.load(bases_ptr + RANK).to(word), 16)
            slot = slot + place + each * (SLOT // 4)
            found_ids = await_words(slot + ROUTES + top, among, given_up_ptr)
            found_weights = await_words(slot + ROUTES + TOP + top, among, given_up_ptr)
            found_ids = tl.where(among, found_ids, -1)
            wanted = _any_of(found_ids, first, COUNT)
            found = await_words(slot + lane, tl.where(here, wanted, 0) != 0, given_up_ptr)
        own = found_ids - first
        own = tl.where((own < 0) | (own >= COUNT), -1, own)
        tl.store(
            rows_words + place_of_row * WORDS + lane, found, mask=tl.where(here, wanted, 0) != 0
        )
        tl.store(rows_ids_ptr + place_of_row * K + top, own, mask=among)
        tl.store(rows_weights_words + place_of_row * K + top, found_weights, mask=among)
    tl.store(turns_ptr + row, turn + 1)


@triton.jit(do_not_specialize=["count", "first"])
def combine_kernel(
    y_ptr, rows_ids_ptr, ids_ptr, out_ptr, bases_ptr, turns_ptr, given_up_ptr, count, first,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr, PROGRAMS: tl.constexpr,
    ROUTES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, TOP: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program r sends back what became of row r of each other rank, and sums this rank's."""
    word: tl.constexpr = tl.pointer_type(tl.int32)
    element: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    here = lane < WORDS
    top = tl.arange(0, TOP)
    among = top < K
    y_words = y_ptr.to(word, bitcast=True)
    depend(EARLY)
    turn = tl.load(turns_ptr + row)
    place = ((turn & 1) * PROGRAMS + row) * (RANKS * SLOT // 4)
    ids = tl.load(ids_ptr + row * K + top, mask=among, other=-1)
    for each in tl.static_range(RANKS):
        if each != RANK:
            place_of_row = (each * count + row).to(tl.int64)
            got = tl.load(rows_ids_ptr + place_of_row * K + top, mask=among, other=-1)
            wanted = tl.max((got >= 0).to(tl.int32), axis=0)
            y = tl.load(
                y_words + place_of_row * WORDS + lane, mask=tl.where(here, wanted, 0) != 0, other=0
            )
            y = tl.where(y == _NOTHING, 0, y)
            theirs = tl.multiple_of(tl.load(bases_ptr + each).to(word), 16)
            theirs = theirs + place + RANK * (SLOT // 4)
            tl.store(theirs + lane, y, mask=tl.where(here, wanted, 0) != 0)
            # A rank of which nobody wants a row is heard as well: it may not run away.
            tl.store(theirs + ROUTES + top, top, mask=top < 1)
    low = tl.zeros((BLOCK,), dtype=tl.float32)
    high = tl.zeros((BLOCK,), dtype=tl.float32)
    for each in tl.static_range(RANKS):
        wanted = _any_of(ids, first + (each - RANK) * STRIDE, COUNT)
        if each == RANK:
            place_of_row = (each * count + row).to(tl.int64)
            found = tl.load(
                y_words + place_of_row * WORDS + lane, mask=tl.where(here, wanted, 0) != 0, other=0
            )
            found = tl.where(found == _NOTHING, 0, found)
        else:
            slot = tl.multiple_of(tl.load(bases_ptr + RANK).to(word), 16)
            slot = slot + place + each * (SLOT // 4)
            await_words(slot + ROUTES + top, top < 1, given_up_ptr)
            found = await_words(slot + lane, tl.where(here, wanted, 0) != 0, given_up_ptr)
        a, b = halves(found, element)
        low += a
        high += b
    out_words = out_ptr.to(word, bitcast=True) + row.to(tl.int64) * WORDS
    tl.store(out_words + lane, words_of(low, high, element), mask=here)
    tl.store(turns_ptr + row, turn + 1)


@triton.jit
def _any_of(ids, first, COUNT: tl.constexpr):
    """1 if an expert of ``COUNT`` from ``first`` on is among them, else 0."""
    return tl.max(((ids >= first) & (ids < first + COUNT)).to(tl.int32), axis=0)
