"""Rows to the ranks that have one of their experts, and back, by kernels that write into the memory
of others: how many rows travel is known on the device alone, so a graph may hold it.

Every rank gets the routes of all rows, and with them knows which rows will come. How a word that
has come is known, see :mod:`reprise.distributed.symmetric`. There is one program for each row of a
rank; larger numbers of rows travel as by the reference.
"""

from torch import Tensor

from reprise.distributed import communicator
from reprise.distributed.symmetric import PROGRAMS, SLOT_BYTES, SymmetricBuffer
from reprise.ops.dispatch import reference
from reprise.ops.dispatch.rows_kernel import combine_kernel, dispatch_kernel
from reprise.ops.triton_util import launch, launch_options, next_power_of_2

ROUTES_BYTES = 256
"""Behind a row: weights and numbers of its experts."""


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
        x, weights, ids, rows, rows_weights, rows_ids, buffer.bases, buffer.turns,
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
        y, rows_ids, ids, out, buffer.bases, buffer.turns, buffer.given_up, len(out), first,
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
        "RANK": buffer.group.rank, "RANKS": buffer.group.size, "SLOT": SLOT_BYTES,
        "PROGRAMS": PROGRAMS, "ROUTES": (SLOT_BYTES - ROUTES_BYTES) // 4,
        "WORDS": words, "BLOCK": next_power_of_2(words), "K": ids.shape[1],
        "TOP": next_power_of_2(ids.shape[1]),
        "num_warps": min(8, max(2, next_power_of_2(words) // 256)),
    }  # fmt: skip
