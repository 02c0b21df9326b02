"""Sums over ranks in their order, with the norm behind them by a kernel."""

from torch import Tensor

from reprise.ops.all_reduce.invariant import all_reduce_add
from reprise.ops.rms_norm.triton import rms_norm


def all_reduce_add_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
) -> Tensor:
    """Shapes as in the reference."""
    all_reduce_add(partial, residual, group)
    return rms_norm(residual, weight, eps)
