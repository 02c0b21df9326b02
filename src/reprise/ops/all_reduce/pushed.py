"""Sums over ranks by one kernel: every rank writes what it has into the others' memory.

A word that has come is known by not being the one that says "nothing yet", so that nobody waits for
a flag behind the data ("Lamport", as in TensorRT-LLM's ``lamport`` all-reduce): one way over the
link is all the time it takes. Whoever has read a word puts "nothing yet" back for the turn after
the next: another rank writes there only when it has got this rank's words of the next turn.
All ranks get the same bits, since all add in the order of ranks.
"""

from torch import Tensor

from reprise.distributed import communicator
from reprise.distributed.symmetric import PROGRAMS, SLOT_BYTES, SymmetricBuffer
from reprise.ops.all_reduce import reference
from reprise.ops.all_reduce.push_kernel import push_kernel
from reprise.ops.triton_util import cdiv, launch, launch_options, next_power_of_2

_LEAST = 512
"""Words of a program, if there are so many."""
_MOST = 128
"""Programs of a sum, none of which is to wait for another to end."""
_MOST_BYTES = _MOST * 8 << 10


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
