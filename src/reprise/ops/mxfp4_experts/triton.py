"""Experts of four bits in Triton: rows are sorted by expert on the device, and each expert that
some row was sent to reads its weight once, in tiles of few rows or of many."""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.ops.experts.grouped_kernel import Config, launch_combine
from reprise.ops.experts.groups import sort_by_expert
from reprise.ops.mxfp4_experts.grouped_kernel import launch_grouped

_BY_ROWS = (
    (4, Config(16, 64, 256, 4, 4, swap=True)),
    (24, Config(32, 64, 128, 4, 4, swap=True)),
    (64, Config(64, 128, 128, 3, 8)),
)
"""Rows of an expert up to which a configuration is used, where all experts have as many."""
_MANY = Config(128, 128, 32, 4, 8)
_WIDE = Config(16, 64, 64, 2, 4)
"""Where numbers are multiplied as float32, which the matrix units do not take."""


def mxfp4_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    limit: float,
) -> Tensor:
    """Shapes as in the reference."""
    rows, top = ids.shape
    count, hidden = down.shape[:2]
    if x.stride(1) != 1:
        x = x.contiguous()
    config = config_for(x, rows * top, count)
    groups = sort_by_expert(ids, count, config.block_m)
    products = x.new_empty((rows * top, 2 * down.shape[2]))
    launch_grouped(
        x, gate_up, gate_up_scale, groups, products, config, top=top, gated=True, limit=limit
    )
    given = x.new_empty((rows * top, hidden))
    launch_grouped(products, down, down_scale, groups, given, config, top=top, gated=False)
    out = x.new_empty(x.shape)
    launch_combine(given, weights, ids, count, out, add=False)
    return out


def config_for(x: Tensor, slots: int, experts: int) -> Config:
    """Sizes of the tiles of both products."""
    if x.dtype is not torch.bfloat16:
        return _WIDE
    return next((each for rows, each in _BY_ROWS if slots <= rows * experts), _MANY)
