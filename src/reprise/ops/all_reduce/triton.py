"""Sums over ranks by one kernel: every rank writes what it has into the memory of the others.

One pass ("one-shot all-reduce"). A word that has come is known by not being the one that says
"nothing yet", so that nobody waits for a flag behind the data ("Lamport" in TensorRT-LLM's and
FlashInfer's kernels): one way over the link is all the time it takes. All ranks get the same bits,
since all add in the order of ranks, in float32, and round once.
"""

from torch import Tensor

from reprise.distributed import communicator
from reprise.distributed.symmetric import PROGRAMS, SLOT_BYTES, SymmetricBuffer
from reprise.ops.all_reduce import reference
from reprise.ops.all_reduce.push_kernel import push_kernel
from reprise.ops.triton_util import cdiv, launch, launch_options, next_power_of_2

LEAST_WORDS = 512
"""Of a program, if there are so many."""
MOST_PROGRAMS = 128
"""They are on the device at the same time: none is to wait for another one's end."""
MOST_BYTES = MOST_PROGRAMS * (8 << 10)
"""Of a sum. Of more the backend's take less time."""


def all_reduce(x: Tensor, group: str) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not pushes(x):
        reference.all_reduce(x, group)
    else:
        communicator(group).begin()
        push(buffer, x, x, add=False)


def all_reduce_add(partial: Tensor, residual: Tensor, group: str) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not pushes(partial) or not residual.is_contiguous():
        reference.all_reduce_add(partial, residual, group)
    else:
        communicator(group).begin()
        push(buffer, partial, residual, add=True)


def pushes(x: Tensor) -> bool:
    """Whether such a sum is pushed; alike on all ranks, for all have as many numbers."""
    return (
        x.is_contiguous()
        and x.is_floating_point()
        and x.itemsize in (2, 4)
        and 0 < x.nbytes <= MOST_BYTES
        and x.nbytes % 4 == 0
        and x.data_ptr() % 4 == 0
    )


def push(buffer: SymmetricBuffer, x: Tensor, out: Tensor, *, add: bool) -> None:
    """Sum ``x`` over the ranks into ``out``, or add the sum to it."""
    words = x.nbytes // 4
    block = max(LEAST_WORDS, next_power_of_2(cdiv(words, MOST_PROGRAMS)))
    assert block <= SLOT_BYTES // 4
    launch(push_kernel, (cdiv(words, block),))(
        x, out, buffer.bases, buffer.turns, buffer.given_up, words,
        RANK=buffer.group.rank, RANKS=buffer.group.size, SLOT=SLOT_BYTES, PROGRAMS=PROGRAMS,
        BLOCK=block, ADD=add, num_warps=min(16, max(4, block // 128)), **launch_options(),
    )  # fmt: skip
