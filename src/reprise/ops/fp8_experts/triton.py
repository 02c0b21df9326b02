"""Experts of eight bits in Triton: rows are sorted by expert on the device, and each expert that
some row was sent to reads its weight once, in tiles of few rows or of many."""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.ops.experts.groups import Groups
from reprise.ops.experts.in_tiles import in_tiles
from reprise.ops.fp8_experts.grouped_kernel import Config, launch_grouped
from reprise.ops.fp8_linear.quantise_kernel import quantise
from reprise.ops.registry import active_platform

_BY_ROWS = (
    (4, Config(16, 64, 6, 4, swap=True)),
    (24, Config(32, 64, 6, 4, swap=True)),
    (64, Config(64, 128, 4, 8)),
)
"""Rows of an expert up to which a configuration is used, where all experts have as many."""
_MANY = Config(128, 128, 4, 8)
"""Where the device multiplies eight bits: numbers made of them take the registers of smaller tiles.
"""
_WIDE = Config(16, 64, 2, 4)
"""Where they are multiplied as float32."""


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
    top = ids.shape[1]
    count, _, inner = down.shape
    platform = active_platform()
    # Matrix units add products of eight bits in fewer bits than float32 has: what is quantised
    # between both products would fall on other codes.
    wide = x.dtype is torch.float32
    native = platform is not None and platform.multiplies_fp8 and not wide
    config = _WIDE if wide else config_for(ids.numel(), count, native)

    def multiply(rows: Tensor, groups: Groups, out: Tensor, *, gated: bool) -> None:
        weight, scale = (gate_up, gate_up_scale) if gated else (down, down_scale)
        launch_grouped(
            *quantise(rows, block_k or rows.shape[1], native), weight, scale, groups, out, config,
            block_n, top=top, gated=gated, limit=limit if gated else 0.0,
        )  # fmt: skip

    out = x.new_empty(x.shape)
    in_tiles(x, weights, ids, count, inner, config.block_m, multiply, out)
    return out


def config_for(slots: int, experts: int, native: bool) -> Config:
    """Sizes of the tiles of both products."""
    most = _MANY if native else _BY_ROWS[-1][1]
    return next((each for rows, each in _BY_ROWS if slots <= rows * experts), most)
