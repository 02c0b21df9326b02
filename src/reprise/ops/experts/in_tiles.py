"""What experts of any kind in Triton have in common: rows are sorted by expert on the device, both
products are taken tile by tile, and each row sums what its experts give."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from reprise.ops.experts.grouped_kernel import launch_combine
from reprise.ops.experts.groups import Groups, sort_by_expert


class Multiply(Protocol):
    def __call__(self, rows: Tensor, groups: Groups, out: Tensor, *, gated: bool) -> None:
        """Multiply each group's rows with its expert's weight.

        Args:
            rows: With ``gated`` [T, D], read by the row of each slot; else [T * K, I] in the order
                of groups.
            groups: Of the slots.
            out: With ``gated`` [T * K, I] in the order of groups, for what the activation gives;
                else [T * K, D], by slot.
            gated: This is the first of both products.
        """


def in_tiles(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: int,
    inner: int,
    block_m: int,
    multiply: Multiply,
    out: Tensor,
    *,
    add: bool = False,
) -> None:
    """Write the weighted sums to ``out`` [T, D], or add them to what it holds if ``add``.

    Args:
        x: [T, D].
        weights: [T, K] float32.
        ids: [T, K] int32; what is no number of an expert goes to none.
        experts: How many there are.
        inner: Inputs of the second product.
        block_m: Rows of a tile.
        multiply: Computes both products.
        out: [T, D], where the result is written.
        add: Add the result to what ``out`` holds.
    """
    rows, top = ids.shape
    if rows == 0:
        return
    groups = sort_by_expert(ids, experts, block_m)
    products = x.new_empty((rows * top, inner))
    multiply(x if x.stride(1) == 1 else x.contiguous(), groups, products, gated=True)
    given = x.new_empty((rows * top, out.shape[1]))
    multiply(products, groups, given, gated=False)
    launch_combine(given, weights, ids, experts, out, add=add)
