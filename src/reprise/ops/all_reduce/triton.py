"""Sums over ranks by one kernel: every rank writes what it has into the memory of the others.

One pass ("one-shot all-reduce"). A word that has come is known by not being the one that says
"nothing yet", so that nobody waits for a flag behind the data ("Lamport" in TensorRT-LLM's and
FlashInfer's kernels): one way over the link is all the time it takes. All ranks get the same bits,
since all add in the order of ranks, in float32, and round once.

Where a norm follows, a program has a row as a whole, and normalises what it has just summed.
"""

import torch
from torch import Tensor

from reprise.distributed import communicator
from reprise.distributed.symmetric import PROGRAMS, SLOT_BYTES, SymmetricBuffer
from reprise.ops.all_reduce import reference
from reprise.ops.all_reduce.push_kernel import push_kernel
from reprise.ops.all_reduce.push_norm_kernel import push_norm_kernel
from reprise.ops.rms_norm.triton import rms_norm
from reprise.ops.triton_util import cdiv, launch, launch_options, next_power_of_2

LEAST_WORDS = 512
"""Of a program, if there are so many."""
MOST_PROGRAMS = 128
"""They are on the device at the same time: none is to wait for another one's end."""
MOST_BYTES = MOST_PROGRAMS * (8 << 10)
"""Of a sum. Of more the backend's take less time."""
PART = 2048
"""Words of a row that go through one slot."""
MOST_ROW_WORDS = 2 * PART
"""Of a row that one program has in its registers."""


def all_reduce(x: Tensor, group: str) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not pushes(x):
        reference.all_reduce(x, group)
    else:
        communicator(group).begin()
        push(buffer, x, x, add=False)


def all_reduce_add(partial: Tensor, residual: Tensor, group: str) -> None:
    buffer = communicator(group).symmetric
    if buffer is None or not pushes(partial, residual):
        reference.all_reduce_add(partial, residual, group)
    else:
        communicator(group).begin()
        push(buffer, partial, residual, add=True)


def all_reduce_add_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
) -> Tensor:
    """Shapes as in the reference."""
    buffer = communicator(group).symmetric
    if buffer is None or not norms(partial, residual):
        all_reduce_add(partial, residual, group)
        return rms_norm(residual, weight, eps)
    communicator(group).begin()
    return push_norm(buffer, partial, residual, weight, eps)


def pushes(x: Tensor, residual: Tensor | None = None) -> bool:
    """Whether such a sum is pushed, and added to such a residual stream; alike on all ranks, for
    all have as many numbers."""
    return (
        x.is_floating_point()
        and x.itemsize in (2, 4)
        and 0 < x.nbytes <= MOST_BYTES
        and x.nbytes % 4 == 0
        and all(
            each.is_contiguous()
            and each.dtype == x.dtype
            and each.shape == x.shape
            and each.data_ptr() % 4 == 0
            for each in (x, x if residual is None else residual)
        )
    )


def norms(partial: Tensor, residual: Tensor) -> bool:
    """Whether such rows are summed and normalised at once; alike on all ranks as well."""
    words = partial.shape[1] * partial.itemsize / 4
    return (
        pushes(partial, residual)
        and words == int(words) <= MOST_ROW_WORDS
        and len(partial) * cdiv(int(words), PART) <= PROGRAMS
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


def push_norm(
    buffer: SymmetricBuffer, partial: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Add the sum of the ranks' ``partial`` to ``residual``, and return the norm of that."""
    words = partial.shape[1] * partial.itemsize // 4
    block = next_power_of_2(words)
    assert PART * 4 <= SLOT_BYTES
    out = torch.empty_like(residual)
    launch(push_norm_kernel, (len(partial),))(
        partial, residual, weight, out, buffer.bases, buffer.turns, buffer.given_up, eps,
        RANK=buffer.group.rank, RANKS=buffer.group.size, SLOT=SLOT_BYTES, PROGRAMS=PROGRAMS,
        WORDS=words, BLOCK=block, PART=PART, num_warps=min(16, max(1, block // 128)),
        **launch_options(),
    )  # fmt: skip
    return out
