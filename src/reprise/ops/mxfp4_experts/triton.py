"""Experts of four bits in Triton: rows are sorted by expert on the device, and each expert that
some row was sent to reads its weight once, in tiles of few rows or of many."""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.ops.experts.grouped_kernel import Config
from reprise.ops.experts.groups import Groups
from reprise.ops.experts.in_tiles import in_tiles
from reprise.ops.mxfp4_experts.few_rows_kernel import launch_few_rows
from reprise.ops.mxfp4_experts.grouped_kernel import launch_grouped

_BY_ROWS = (
    (2, Config(8, 128, 256, 2, 4, swap=True, together=2)),
    (6, Config(16, 64, 256, 3, 4, swap=True)),
    (24, Config(32, 64, 128, 3, 4, swap=True)),
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
    top = ids.shape[1]
    count, _, half = down.shape
    config = config_for(x, ids.numel(), count)
    few = config.swap and x.dtype is torch.bfloat16
    launch_product = launch_few_rows if few else launch_grouped

    def multiply(rows: Tensor, groups: Groups, out: Tensor, *, gated: bool) -> None:
        weight, exponents = (gate_up, gate_up_scale) if gated else (down, down_scale)
        launch_product(
            rows, weight, exponents, groups, out, config, top=top, gated=gated,
            limit=limit if gated else 0.0,
        )  # fmt: skip

    out = x.new_empty(x.shape)
    in_tiles(x, weights, ids, count, 2 * half, config.block_m, multiply, out)
    return out


def config_for(x: Tensor, slots: int, experts: int) -> Config:
    """Sizes of the tiles of both products."""
    if x.dtype is not torch.bfloat16:
        return _WIDE
    return next((each for rows, each in _BY_ROWS if slots <= rows * experts), _MANY)
