"""Products of eight bits in Triton whose bits of a row depend on that row alone: programs share a
tile as the weight's shape asks for, whatever the number of rows."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from reprise.ops.fp8_linear.accepts import STEP
from reprise.ops.fp8_linear.product_kernel import Config, fitted, launch_product
from reprise.ops.fp8_linear.quantise_kernel import quantise
from reprise.ops.registry import active_platform
from reprise.ops.triton_util import takes_ptx

_CONFIGS = (
    Config(16, 64, 4, 2, 4, 3, late=True, apart=True),
    Config(64, 64, 1, 6, 4, 2, late=False, apart=True),
    Config(128, 128, 1, 3, 8, 0, late=False, apart=True),
)
"""The last for any number of rows where instructions may differ by the size of a tile."""
_MOST_ROWS = 1024
"""Of a launch: programs leave their sums of a tile for each other."""


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    """Shapes as in the reference."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _launch(x, None, 0.0, weight, scale, bias, block_n, block_k, out)
    return out


def fp8_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor,
    bias: Tensor | None, block_n: int, block_k: int,
) -> Tensor:  # fmt: skip
    """Shapes as in the reference."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _launch(x, norm_weight, eps, weight, scale, bias, block_n, block_k, out)
    return out


def fp8_norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor,
    bias: Tensor | None, block_n: int, block_k: int,
) -> Tensor:  # fmt: skip
    """Shapes as in the reference."""
    out = x.new_empty((x.shape[0], weight.shape[0] // 2))
    _launch(x, norm_weight, eps, weight, scale, bias, block_n, block_k, out, gated=True)
    return out


def fp8_linear_add(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    block_n: int, block_k: int,
) -> None:  # fmt: skip
    """Shapes as in the reference."""
    _launch(x, None, 0.0, weight, scale, bias, block_n, block_k, residual, add=True)


def _launch(
    x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, scale: Tensor,
    bias: Tensor | None, block_n: int, block_k: int, out: Tensor, *, add: bool = False,
    gated: bool = False,
) -> None:  # fmt: skip
    platform = active_platform()
    native = platform is not None and platform.multiplies_fp8
    outputs, inputs = weight.shape
    for begin in range(0, len(x), _MOST_ROWS):
        some = slice(begin, begin + _MOST_ROWS)
        numbers, scales = quantise(x[some], block_k, native, norm_weight, eps, alike=True)
        launch_product(
            numbers, scales, weight, scale, bias, out[some], block_n,
            add=add, gated=gated,
            config=_config_of(len(x[some]), outputs, inputs, x.device, not native, takes_ptx()),
        )  # fmt: skip


@functools.cache
def _config_of(
    rows: int, outputs: int, inputs: int, device: torch.device, wide: bool, ptx: bool
) -> Config:
    """Sizes by the number of rows, and as many programs that share a tile for any."""
    splits = fitted(replace(_CONFIGS[0], together=1), outputs, inputs, device, wide).splits
    config = next((each for each in _CONFIGS if ptx and rows <= each.rows), _CONFIGS[-1])
    config = replace(config, together=math.gcd(inputs // STEP // splits, config.together))
    return replace(fitted(config, outputs, inputs, device, wide), splits=splits)
