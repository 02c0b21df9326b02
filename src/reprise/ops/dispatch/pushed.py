"""Rows to the ranks that have one of their experts, and back, by kernels that write into the memory
of others: how many rows travel is known on the device alone, so a graph may hold it.

Every rank gets the routes of all rows, and with them knows which rows will come. How a word that
has come is known, see :mod:`reprise.ops.all_reduce.pushed`. There is one program for each row of a
rank; larger numbers of rows travel as by the reference.
"""

import triton
import triton.language as tl
from torch import Tensor

from reprise.distributed import communicator
from reprise.distributed.symmetric import NOTHING, PROGRAMS, SLOT_BYTES, SymmetricBuffer
from reprise.ops.all_reduce.pushed import await_words, halves, words_of
from reprise.ops.dispatch import reference
from reprise.ops.triton_util import depend, launch, launch_options, next_power_of_2

ROUTES_BYTES = 256
"""Behind a row: weights and numbers of its experts."""
_NOTHING = tl.constexpr(NOTHING)


def dispatch(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    first: int,
    count: int,
    stride: int,
    rows: Tensor,
    rows_weights: Tensor,
    rows_ids: Tensor,
    group: str,
) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not takes(x, ids):
        reference.dispatch(
            x, weights, ids, first, count, stride, rows, rows_weights, rows_ids, group
        )
        return
    communicator(group).begin()
    launch(dispatch_kernel, (len(x),))(
        x, weights, ids, rows, rows_weights, rows_ids, buffer.bases, buffer.pushes,
        buffer.given_up, len(x), first, **_options(buffer, x, ids), COUNT=count, STRIDE=stride,
        **launch_options(),
    )  # fmt: skip


def combine(
    y: Tensor,
    rows_ids: Tensor,
    ids: Tensor,
    first: int,
    count: int,
    stride: int,
    out: Tensor,
    group: str,
) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not takes(out, ids):
        reference.combine(y, rows_ids, ids, first, count, stride, out, group)
        return
    communicator(group).begin()
    launch(combine_kernel, (len(out),))(
        y, rows_ids, ids, out, buffer.bases, buffer.pushes, buffer.given_up, len(out), first,
        **_options(buffer, out, ids), COUNT=count, STRIDE=stride, **launch_options(),
    )  # fmt: skip


def takes(x: Tensor, ids: Tensor) -> bool:
    """Whether such rows are pushed; alike on all ranks, for all have equally many."""
    row = x.shape[1] * x.itemsize
    return (
        0 < len(x) <= PROGRAMS
        and row % 16 == 0
        and row <= SLOT_BYTES - ROUTES_BYTES
        and 8 * next_power_of_2(ids.shape[1]) <= ROUTES_BYTES
        and x.is_contiguous()
        and ids.is_contiguous()
    )


def _options(buffer: SymmetricBuffer, x: Tensor, ids: Tensor) -> dict[str, int]:
    words = x.shape[1] * x.itemsize // 4
    return {
        "RANK": buffer.group.rank, "RANKS": buffer.group.size, "SLOTS": buffer.slots,
        "SLOT": SLOT_BYTES, "PROGRAMS": PROGRAMS, "ROUTES": (SLOT_BYTES - ROUTES_BYTES) // 4,
        "WORDS": words, "BLOCK": next_power_of_2(words), "K": ids.shape[1],
        "TOP": next_power_of_2(ids.shape[1]),
        "num_warps": min(8, max(2, next_power_of_2(words) // 256)),
    }  # fmt: skip


@triton.jit(do_not_specialize=["count", "first"])
def dispatch_kernel(
    x_ptr, weights_ptr, ids_ptr, rows_ptr, rows_weights_ptr, rows_ids_ptr,
    bases_ptr, turns_ptr, given_up_ptr, count, first,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr, SLOT: tl.constexpr,
    PROGRAMS: tl.constexpr, ROUTES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
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
    place = SLOTS // 4 + ((turn & 1) * PROGRAMS + row) * (RANKS * SLOT // 4)
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
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr, SLOT: tl.constexpr,
    PROGRAMS: tl.constexpr, ROUTES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
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
    place = SLOTS // 4 + ((turn & 1) * PROGRAMS + row) * (RANKS * SLOT // 4)
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
