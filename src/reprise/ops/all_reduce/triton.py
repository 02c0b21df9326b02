"""Sums over ranks by one kernel: every rank reads what all have, and adds it in the same order.

One pass (Kumar et al., "one-shot all-reduce"): for what a decode step sums, waiting for the others
once costs more than reading everything. All ranks get the same bits, whatever their number in the
group, since all add from rank 0 on.
"""

import triton
import triton.language as tl
from torch import Tensor

from reprise.distributed import communicator
from reprise.distributed.symmetric import BLOCKS, STAGE_BYTES, SymmetricBuffer
from reprise.ops.all_reduce import reference
from reprise.ops.triton_util import cdiv, depend, launch, launch_options, next_power_of_2

_LEAST = 1024
"""Elements of a program, if there are so many."""


def all_reduce(x: Tensor, group: str) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not buffer.takes(x):
        reference.all_reduce(x, group)
    else:
        communicator(group).begin()
        _sum(buffer, x, x, add=False)


def all_reduce_add(partial: Tensor, residual: Tensor, group: str) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not buffer.takes(partial) or not residual.is_contiguous():
        reference.all_reduce_add(partial, residual, group)
    else:
        communicator(group).begin()
        _sum(buffer, partial, residual, add=True)


def _sum(buffer: SymmetricBuffer, x: Tensor, out: Tensor, *, add: bool) -> None:
    count = x.numel()
    block = max(_LEAST, next_power_of_2(cdiv(count, BLOCKS)))
    launch(sum_kernel, (cdiv(count, block),))(
        x, out, buffer.bases, buffer.turns, count,
        RANK=buffer.group.rank, RANKS=buffer.group.size, FLAGS=buffer.flags,
        STAGE=STAGE_BYTES, BLOCKS=BLOCKS, BLOCK=block, ADD=add,
        num_warps=min(16, max(4, block // 512)), **launch_options(),
    )  # fmt: skip


@triton.jit
def sum_kernel(
    x_ptr, out_ptr, bases_ptr, turns_ptr, count,
    RANK: tl.constexpr, RANKS: tl.constexpr, FLAGS: tl.constexpr,
    STAGE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program b sums elements from b * BLOCK on."""
    program = tl.program_id(0)
    index = program * BLOCK + tl.arange(0, BLOCK)
    here = index < count
    element = x_ptr.dtype
    depend(EARLY)
    turn = tl.load(turns_ptr + program)
    x = tl.load(x_ptr + index, mask=here, other=0.0)
    place = (2 * program + (turn & 1)) * STAGE
    lane = tl.arange(0, BLOCK)
    own = (tl.load(bases_ptr + RANK) + place).to(element)
    tl.store(own + lane, x, mask=here)
    tl.debug_barrier()
    # Tell everyone that it is there. One number at a time: what a program gets of an atomic
    # access to a few is known to some of its threads only.
    for each in tl.static_range(RANKS):
        told = tl.load(bases_ptr + each) + FLAGS + 4 * (program * RANKS + RANK)
        tl.atomic_xchg(told.to(tl.pointer_type(tl.int32)), turn + 1, sem="release", scope="sys")
    flags = tl.load(bases_ptr + RANK) + FLAGS
    given_up = (flags + 4 * BLOCKS * RANKS).to(tl.pointer_type(tl.int32))
    for each in tl.static_range(RANKS):
        heard = (flags + 4 * (program * RANKS + each)).to(tl.pointer_type(tl.int32))
        waits = 1
        while waits != 0:
            seen = tl.atomic_add(heard, 0, sem="acquire", scope="sys")
            # Numbers of turns begin anew behind the largest: their distance counts.
            waits = (seen - (turn + 1) < 0).to(tl.int32)
            waits = tl.where(tl.load(given_up, volatile=True) != 0, 0, waits)
    tl.debug_barrier()
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for each in tl.static_range(RANKS):
        theirs = (tl.load(bases_ptr + each) + place).to(element)
        total += tl.load(theirs + lane, mask=here, other=0.0, cache_modifier=".cv").to(tl.float32)
    result = total.to(x.dtype)
    if ADD:
        result = tl.load(out_ptr + index, mask=here, other=0.0) + result
    tl.store(out_ptr + index, result, mask=here)
    tl.store(turns_ptr + program, turn + 1)
