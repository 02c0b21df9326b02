"""Experts of eight bits in Triton: rows are sorted by expert on the device, and each expert that
some row was sent to reads its weight once, in tiles of few rows or of many."""

from __future__ import annotations

from torch import Tensor

from reprise.ops.experts.grouped_kernel import launch_combine
from reprise.ops.experts.groups import sort_by_expert
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
    rows, top = ids.shape
    count, hidden, inner = down.shape
    platform = active_platform()
    native = platform is not None and platform.multiplies_fp8
    if x.stride(1) != 1:
        x = x.contiguous()
    config = config_for(rows * top, count, native)
    groups = sort_by_expert(ids, count, config.block_m)
    products = x.new_empty((rows * top, inner))
    launch_grouped(
        *quantise(x, block_k or hidden, native), gate_up, gate_up_scale, groups, products, config,
        block_n, top=top, gated=True, limit=limit,
    )  # fmt: skip
    given = x.new_empty((rows * top, hidden))
    launch_grouped(
        *quantise(products, block_k or inner, native), down, down_scale, groups, given, config,
        block_n, top=top, gated=False,
    )  # fmt: skip
    out = x.new_empty(x.shape)
    launch_combine(given, weights, ids, count, out, add=False)
    return out


def config_for(slots: int, experts: int, native: bool) -> Config:
    """Sizes of the tiles of both products."""
    most = _MANY if native else _BY_ROWS[-1][1]
    return next((each for rows, each in _BY_ROWS if slots <= rows * experts), most)
