"""Sums over ranks by one kernel: every rank writes what it has into the others' memory.

A word that has come is known by not being the one that says "nothing yet", so that nobody waits for
a flag behind the data ("Lamport", as in TensorRT-LLM's ``lamport`` all-reduce): one way over the
link is all the time it takes. Whoever has read a word puts "nothing yet" back for the turn after
the next: another rank writes there only when it has got this rank's words of the next turn.
All ranks get the same bits, since all add in the order of ranks.
"""

import triton
import triton.language as tl
from torch import Tensor

from reprise.distributed import communicator
from reprise.distributed.symmetric import NOTHING, PROGRAMS, SLOT_BYTES, SymmetricBuffer
from reprise.ops.all_reduce import reference
from reprise.ops.triton_util import cdiv, depend, launch, launch_options, next_power_of_2

_LEAST = 512
"""Words of a program, if there are so many."""
_MOST = 128
"""Programs of a sum, none of which is to wait for another to end."""
_MOST_BYTES = _MOST * 8 << 10
_NOTHING = tl.constexpr(NOTHING)


def all_reduce(x: Tensor, group: str) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not takes(buffer, x):
        reference.all_reduce(x, group)
    else:
        communicator(group).begin()
        push(buffer, x, x, add=False)


def all_reduce_add(partial: Tensor, residual: Tensor, group: str) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not takes(buffer, partial) or not residual.is_contiguous():
        reference.all_reduce_add(partial, residual, group)
    else:
        communicator(group).begin()
        push(buffer, partial, residual, add=True)


def takes(buffer: SymmetricBuffer, x: Tensor) -> bool:
    return buffer.takes(x) and x.nbytes % 4 == 0 and x.nbytes <= _MOST_BYTES


def push(
    buffer: SymmetricBuffer, x: Tensor, out: Tensor, *, add: bool, least: int = _LEAST
) -> None:
    words = x.nbytes // 4
    block = max(least, next_power_of_2(cdiv(words, _MOST)))
    launch(push_kernel, (cdiv(words, block),))(
        x, out, buffer.bases, buffer.pushes, buffer.given_up, words,
        RANK=buffer.group.rank, RANKS=buffer.group.size, SLOTS=buffer.slots,
        SLOT=SLOT_BYTES, PROGRAMS=PROGRAMS, BLOCK=block, ADD=add,
        num_warps=min(16, max(4, block // 128)), **launch_options(),
    )  # fmt: skip


@triton.jit
def push_kernel(
    x_ptr, out_ptr, bases_ptr, turns_ptr, given_up_ptr, words,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr, SLOT: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
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
    place = SLOTS // 4 + ((turn & 1) * PROGRAMS + program) * (RANKS * SLOT // 4)
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
