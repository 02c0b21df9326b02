"""Experts through torch's product of groups: rows are sorted by their expert, on the device.

torch reads where groups end inside of the op, so that a recorded graph reads them anew each time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.silu_and_mul.reference import reference as silu_and_mul
from reprise.platforms import Platform

_ALIGNMENT = 16
"""Bytes that rows of operands are multiples of."""


def needs_grouped_mm(platform: Platform) -> str | None:
    if platform.device.type != "cpu":
        return "it is used on the CPU"
    return None if hasattr(F, "grouped_mm") else "this torch has no grouped_mm"


def accepts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
) -> str | None:
    sizes = x.shape[1], down.shape[2]
    if any(each * x.element_size() % _ALIGNMENT for each in sizes):
        return f"rows of {sizes[0]} and {sizes[1]} are no multiples of {_ALIGNMENT} bytes"
    return None


def experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Shapes as in the reference."""
    rows, top = ids.shape
    count = len(gate_up)
    real = (ids >= 0) & (ids < count)
    # Those of nobody go behind all others, where no group reaches.
    sorted_ids, order = torch.where(real, ids, count).flatten().sort(stable=True)
    numbers = torch.arange(count, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(sorted_ids, numbers, right=True).int()
    hidden = silu_and_mul(F.grouped_mm(x[order // top], gate_up.transpose(1, 2), offs=ends))
    products = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
    shares = torch.where(real, weights, 0.0).flatten()[order].unsqueeze(1)
    # What lies behind the last group is not written.
    products = torch.where(shares != 0, products.float() * shares, 0.0)
    by_slot = torch.empty_like(products)
    by_slot[order] = products
    return by_slot.view(rows, top, -1).sum(dim=1).to(x.dtype)


def experts_add(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor
) -> None:
    """Shapes as in the reference."""
    residual.add_(experts(x, weights, ids, gate_up, down))
