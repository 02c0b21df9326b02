"""Experts in Triton, by how many rows there are.

Up to a few rows each row multiplies with its own experts (:mod:`one_row_kernels`). More are sorted
by expert on the device (:mod:`groups`) and multiplied in tiles (:mod:`grouped_kernel`): small ones
while an expert has few rows, so that the weights' way from memory is all that counts, and full ones
for prompts. Grids follow from the shapes: programs that no tile is left for end at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.ops.experts.grouped_kernel import Config, launch_grouped
from reprise.ops.experts.groups import Groups
from reprise.ops.experts.in_tiles import in_tiles
from reprise.ops.experts.one_row_kernels import launch_one_row
from reprise.ops.triton_util import limits

_MOST_ALONE = 2
"""Rows that are not worth sorting."""
_BY_ROWS = (
    (4, Config(16, 64, 128, 4, 4, swap=True)),
    (24, Config(32, 64, 128, 4, 4, swap=True)),
    (64, Config(64, 128, 128, 4, 8)),
)
"""Rows of an expert up to which a configuration is used, where all experts have as many."""
_MANY = Config(128, 256, 64, 4, 8)
_MANY_NARROW = Config(128, 128, 64, 4, 8)
"""Where shared memory does not hold all stages of that: there matrix units take their operands from
registers, too, and the wider tile leaves too few."""
WIDE = Config(16, 64, 64, 4, 4)
"""For float32, which the matrix units do not take."""


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    limit: float = 0.0,
) -> Tensor:
    """Shapes as in the reference."""
    out = x.new_empty(x.shape)
    _experts(x, weights, ids, gate_up, down, out, add=False)
    return out


def experts_add(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor
) -> None:
    """Shapes as in the reference."""
    _experts(x, weights, ids, gate_up, down, residual, add=True)


def config_for(x: Tensor, slots: int, experts: int) -> Config:
    """Sizes of the tiles of both products."""
    if x.dtype is torch.float32:
        return WIDE
    stages = (_MANY.block_m + _MANY.block_n) * _MANY.block_k * x.element_size() * _MANY.num_stages
    many = _MANY if stages <= limits(x.device).shared_memory else _MANY_NARROW
    return next((each for most, each in _BY_ROWS if slots <= most * experts), many)


def _experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, out: Tensor,
    *, add: bool,
) -> None:  # fmt: skip
    rows, top = ids.shape
    if rows <= _MOST_ALONE:
        x = x if x.stride(1) == 1 else x.contiguous()
        launch_one_row(x, weights, ids, gate_up, down, out, add=add)
        return
    config = config_for(x, rows * top, len(down))
    launch_sorted(x, weights, ids, gate_up, down, out, config, add=add)


def launch_sorted(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, out: Tensor,
    config: Config, *, add: bool,
) -> None:  # fmt: skip
    """Write the weighted sums to ``out`` [T, D], or add them to what it holds if ``add``: by tiles
    of ``config``, whatever the number of rows."""
    count, _, inner = down.shape
    top = ids.shape[1]

    def multiply(rows: Tensor, groups: Groups, out: Tensor, *, gated: bool) -> None:
        weight = gate_up if gated else down
        launch_grouped(rows, weight, groups, out, config, top=top, gated=gated)

    in_tiles(x, weights, ids, count, inner, config.block_m, multiply, out, add=add)
