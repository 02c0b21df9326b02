"""Products with weights of four bits in Triton whose bits of a row depend on that row alone: a
plain weight is made for the moment, for any number of rows, and multiplied as those are."""

from __future__ import annotations

from torch import Tensor

from reprise.ops.linear.shared_sums_kernel import launch_product
from reprise.ops.rms_norm.triton import rms_norm
from reprise.ops.w4_linear.dequantise_kernel import dequantise


def w4_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """Shapes as in the reference."""
    out = x.new_empty((x.shape[0], packed.shape[0]))
    launch_product(x, dequantise(packed, scales, zeros, group), bias, out, made_now=True)
    return out


def w4_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, packed: Tensor, scales: Tensor,
    zeros: Tensor | None, bias: Tensor | None, group: int,
) -> Tensor:  # fmt: skip
    """Shapes as in the reference."""
    return w4_linear(rms_norm(x, norm_weight, eps), packed, scales, zeros, bias, group)


def w4_norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, packed: Tensor, scales: Tensor,
    zeros: Tensor | None, bias: Tensor | None, group: int,
) -> Tensor:  # fmt: skip
    """Shapes as in the reference."""
    out = x.new_empty((x.shape[0], packed.shape[0] // 2))
    weight = dequantise(packed, scales, zeros, group)
    launch_product(rms_norm(x, norm_weight, eps), weight, bias, out, gated=True, made_now=True)
    return out


def w4_linear_add(
    x: Tensor, residual: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None,
    bias: Tensor | None, group: int,
) -> None:  # fmt: skip
    """Shapes as in the reference."""
    weight = dequantise(packed, scales, zeros, group)
    launch_product(x, weight, bias, residual, add=True, made_now=True)
