"""Experts of eight bits through torch's product of groups, on what the eight bits stand for.

The weights of a layer are written out as float32 first, whichever experts are hit: a stopgap where
no kernel multiplies eight bits. The reference multiplies all rows with each expert.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from reprise.ops.experts.reference import activation
from reprise.ops.experts.torch import ALIGNMENT, by_expert
from reprise.ops.fp8_linear.reference import dequantise, quantise


def accepts(x: Tensor, down: Tensor, **_: Any) -> str | None:
    sizes = x.shape[1], down.shape[2]
    if any(4 * each % ALIGNMENT for each in sizes):
        return f"rows of {sizes[0]} and {sizes[1]} float32 are no multiples of {ALIGNMENT} bytes"
    return None


def fp8_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    block_n: int,
    block_k: int,
    limit: float,
) -> Tensor:
    """Shapes as in the reference."""

    def product(rows: Tensor, ends: Tensor, stack: Tensor, scale: Tensor) -> Tensor:
        group = block_k or rows.shape[1]
        numbers, scales = quantise(rows, group)
        seen = dequantise(numbers, scales, 1, group)
        meant = dequantise(stack, scale, block_n, group)
        return F.grouped_mm(seen, meant.transpose(1, 2), offs=ends).to(x.dtype)

    def multiply(rows: Tensor, ends: Tensor) -> Tensor:
        hidden = activation(product(rows, ends, gate_up, gate_up_scale), limit)
        return product(hidden, ends, down, down_scale)

    return by_expert(x, weights, ids, len(gate_up), multiply)
