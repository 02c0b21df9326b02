"""Experts on a host such that the bits of a row depend on that row and its experts alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reprise.ops.linear.invariant import linear
from reprise.ops.silu_and_mul.invariant import silu_and_mul


def accepts(limit: float = 0.0, **_: Any) -> str | None:
    return f"gates are not clamped (limit={limit:.4g})" if limit else None


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    limit: float = 0.0,
) -> Tensor:
    """Shapes as in the reference; the sum has the order of a row's experts in ``ids``."""
    rows, top = ids.shape
    products = x.new_zeros((rows, top, x.shape[1]), dtype=weights.dtype)
    for expert in ids.unique().tolist():
        if not 0 <= expert < len(gate_up):
            continue
        row, place = (ids == expert).nonzero(as_tuple=True)
        hidden = silu_and_mul(linear(x[row], gate_up[expert], None))
        product = linear(hidden, down[expert], None).float()
        products[row, place] = product * weights[row, place].unsqueeze(1)
    total = products[:, 0]
    for place in range(1, top):
        total = total + products[:, place]
    return total.to(x.dtype)


def experts_add(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor
) -> None:
    """Shapes as in the reference."""
    residual.add_(experts(x, weights, ids, gate_up, down))
