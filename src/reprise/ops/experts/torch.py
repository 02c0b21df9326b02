"""Experts through torch's product of groups: rows are sorted by their expert, on the device.

torch reads where groups end inside of the op, so that a recorded graph reads them anew each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.experts.reference import activation
from reprise.platforms import Platform

ALIGNMENT = 16
"""Bytes that rows of operands are multiples of."""


def needs_grouped_mm(platform: Platform) -> str | None:
    if platform.device.type != "cpu":
        return "it is used on the CPU"
    return None if hasattr(F, "grouped_mm") else "this torch has no grouped_mm"


def accepts(x: Tensor, down: Tensor, **_: Any) -> str | None:
    sizes = x.shape[1], down.shape[2]
    if any(each * x.element_size() % ALIGNMENT for each in sizes):
        return f"rows of {sizes[0]} and {sizes[1]} are no multiples of {ALIGNMENT} bytes"
    return None


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    limit: float = 0.0,
) -> Tensor:
    """Shapes as in the reference."""

    def multiply(rows: Tensor, ends: Tensor) -> Tensor:
        hidden = activation(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends), limit)
        return F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)

    return by_expert(x, weights, ids, len(gate_up), multiply)


def experts_add(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor
) -> None:
    """Shapes as in the reference."""
    residual.add_(experts(x, weights, ids, gate_up, down))


def by_expert(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    count: int,
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The weighted sum of what each row's experts give.

    Args:
        x: [T, D].
        weights: [T, K] float32.
        ids: [T, K]; what is no number below ``count`` goes to no expert.
        count: Experts.
        multiply: Of rows [T * K, D], sorted by expert, and the place behind each expert's, [E]
            int32, what the experts make of theirs; anything for rows behind the last expert's.
    """
    rows, top = ids.shape
    real = (ids >= 0) & (ids < count)
    # Those of no expert go behind all others, where no group reaches.
    sorted_ids, order = torch.where(real, ids, count).flatten().sort(stable=True)
    numbers = torch.arange(count, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(sorted_ids, numbers, right=True).int()
    products = multiply(x[order // top], ends)
    shares = torch.where(real, weights, 0.0).flatten()[order].unsqueeze(1)
    # What lies behind the last group is not written.
    products = torch.where(shares != 0, products.float() * shares, 0.0)
    by_slot = torch.empty_like(products)
    by_slot[order] = products
    return by_slot.view(rows, top, -1).sum(dim=1).to(x.dtype)
