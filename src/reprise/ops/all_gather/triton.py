# mypy: allow-untyped-defs, no-check-untyped-defs
"""What the backend gathers rank by rank, put side by side by one kernel at the memory's speed."""

import triton
import triton.language as tl
from torch import Tensor

from reprise.distributed import communicator
from reprise.ops.triton_util import cdiv, depend, launch, launch_options

_BLOCK = 4096
"""Columns of one row and one rank that a program copies."""


def all_gather(x: Tensor, out: Tensor, group: str) -> None:
    """Shapes as in the reference; columns of ``out`` adjoin."""
    gathered = communicator(group).all_gather(x)
    ranks, rows, columns = gathered.shape
    if not x.numel():
        return
    launch(beside_kernel, (rows, ranks, cdiv(columns, _BLOCK)))(
        gathered, out, rows, columns, out.shape[1], out.stride(0), BLOCK=_BLOCK, num_warps=8,
        **launch_options(),
    )  # fmt: skip


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
