"""Sums over ranks whose order is that of the ranks, whatever is summed: a backend chooses by size
how it cuts numbers, and adds them in other orders. Every rank gets what all have, and adds it."""

from __future__ import annotations

from torch import Tensor

from reprise.distributed import communicator
from reprise.ops.rms_norm.reference import reference as rms_norm


def all_reduce(x: Tensor, group: str) -> None:
    """Shapes as in the reference."""
    x.copy_(_sum(x, group))


def all_reduce_add(partial: Tensor, residual: Tensor, group: str) -> None:
    """Shapes as in the reference."""
    all_reduce(partial, group)
    residual.add_(partial)


def all_reduce_add_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
) -> Tensor:
    """Shapes as in the reference."""
    all_reduce_add(partial, residual, group)
    return rms_norm(residual, weight, eps)


def _sum(x: Tensor, group: str) -> Tensor:
    """In float32, from rank 0 on, rounded to the dtype of ``x``: as the kernel that pushes does."""
    first, *others = communicator(group).all_gather(x.contiguous()).unbind()
    total = first.float() + 0.0
    for each in others:
        total += each
    return total.to(x.dtype)
