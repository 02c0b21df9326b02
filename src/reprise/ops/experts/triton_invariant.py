"""Experts in Triton such that the bits of a row depend on that row and its experts alone: rows are
sorted by expert, however few they are, and one size of tile multiplies them."""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.ops.experts.grouped_kernel import Config
from reprise.ops.experts.triton import WIDE, launch_sorted

_CONFIG = Config(32, 64, 128, 4, 4, swap=True)


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
    launch_sorted(x, weights, ids, gate_up, down, out, _config(x), add=False)
    return out


def experts_add(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor
) -> None:
    """Shapes as in the reference."""
    launch_sorted(x, weights, ids, gate_up, down, residual, _config(x), add=True)


def _config(x: Tensor) -> Config:
    return WIDE if x.dtype is torch.float32 else _CONFIG
