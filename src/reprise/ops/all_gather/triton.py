"""Columns of every rank side by side: few are pushed to where they belong by one kernel; what the
backend gathers rank by rank is put in place by another at the memory's speed."""

from torch import Tensor

from reprise.distributed import communicator
from reprise.distributed.symmetric import PROGRAMS, SLOT_BYTES, SymmetricBuffer
from reprise.ops.all_gather.kernels import beside_kernel, push_beside_kernel
from reprise.ops.triton_util import cdiv, launch, launch_options

_BLOCK = 4096
"""Columns of one row and one rank that a program copies."""
_WORDS = (512, 1024, 2048)
"""Words of 32 bits that a program pushes."""
_MOST_PROGRAMS = 128
"""As of sums."""


def all_gather(x: Tensor, out: Tensor, group: str) -> None:
    """Shapes as in the reference; columns of ``out`` adjoin."""
    ranks = communicator(group)
    if ranks.symmetric is not None and (block := words_of(x, out)):
        ranks.begin()
        push_beside(ranks.symmetric, x, out, block)
        return
    gathered = ranks.all_gather(x)
    size, rows, columns = gathered.shape
    if not x.numel():
        return
    launch(beside_kernel, (rows, size, cdiv(columns, _BLOCK)))(
        gathered, out, rows, columns, out.shape[1], out.stride(0), BLOCK=_BLOCK, num_warps=8,
        **launch_options(),
    )  # fmt: skip


def words_of(x: Tensor, out: Tensor) -> int:
    """What a program pushes of such columns; 0: they are not pushed. Alike on all ranks."""
    if not (
        x.is_floating_point()
        and x.numel()
        and x.is_contiguous()
        and x.itemsize in (2, 4)
        and all(n * x.itemsize % 4 == 0 for n in (x.shape[1], out.shape[1], out.stride(0)))
        and x.data_ptr() % 4 == out.data_ptr() % 4 == 0
    ):
        return 0
    words = x.shape[1] * x.itemsize // 4
    return next((n for n in _WORDS if len(x) * cdiv(words, n) <= _MOST_PROGRAMS), 0)


def push_beside(buffer: SymmetricBuffer, x: Tensor, out: Tensor, block: int) -> None:
    """Write every rank's columns side by side."""
    each = 4 // x.itemsize
    words = x.shape[1] // each
    assert block * 4 <= SLOT_BYTES
    launch(push_beside_kernel, (len(x), cdiv(words, block)))(
        x, out, buffer.bases, buffer.turns, buffer.given_up, words, out.shape[1] // each,
        out.stride(0) // each, RANK=buffer.group.rank, RANKS=buffer.group.size, SLOT=SLOT_BYTES,
        PROGRAMS=PROGRAMS, BLOCK=block, num_warps=block // 128, **launch_options(),
    )  # fmt: skip
