# mypy: allow-untyped-defs, no-check-untyped-defs
"""Columns of ranks put side by side: out of what was gathered, or out of what ranks push."""

import triton
import triton.language as tl

from reprise.distributed.symmetric import NOTHING
from reprise.ops.all_reduce.push_kernel import await_words
from reprise.ops.triton_util import depend

_NOTHING = tl.constexpr(NOTHING)


@triton.jit(do_not_specialize=["rows"])
def beside_kernel(
    x_ptr, out_ptr, rows, columns, wanted, out_stride, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """Program (r, n, b) copies block b of what rank n has of row r. x: [ranks, rows, columns]."""
    row, rank = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    target = rank * columns + column
    here = (column < columns) & (target < wanted)
    depend(EARLY)
    x = tl.load(x_ptr + (rank * rows + row).to(tl.int64) * columns + column, mask=here)
    tl.store(out_ptr + row.to(tl.int64) * out_stride + target, x, mask=here)


@triton.jit
def push_beside_kernel(
    x_ptr, out_ptr, bases_ptr, turns_ptr, given_up_ptr, words, wanted, out_stride,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (r, b) has block b of every rank's row r. Sizes count words of 32 bits."""
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + lane
    here = column < words
    word: tl.constexpr = tl.pointer_type(tl.int32)
    out_words = out_ptr.to(word, bitcast=True) + row * out_stride
    depend(EARLY)
    turn = tl.load(turns_ptr + program)
    own = tl.load(x_ptr.to(word, bitcast=True) + row * words + column, mask=here, other=0)
    own = tl.where(own == _NOTHING, 0, own)
    place = ((turn & 1) * PROGRAMS + program) * (RANKS * SLOT // 4) + lane
    for each in tl.static_range(RANKS):
        if each != RANK:
            theirs = tl.multiple_of(tl.load(bases_ptr + each).to(word), 16)
            tl.store(theirs + place + RANK * (SLOT // 4), own, mask=here)
    for each in tl.static_range(RANKS):
        found = own
        if each != RANK:
            ours = tl.multiple_of(tl.load(bases_ptr + RANK).to(word), 16)
            found = await_words(ours + place + each * (SLOT // 4), here, given_up_ptr)
        target = each * words + column
        tl.store(out_words + target, found, mask=here & (target < wanted))
    tl.store(turns_ptr + program, turn + 1)
