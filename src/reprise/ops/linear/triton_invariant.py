"""Products in Triton whose bits of a row depend on that row alone, with what comes before them or
behind; see :mod:`shared_sums_kernel`, and :mod:`same_bits` for many rows."""

from __future__ import annotations

from torch import Tensor

from reprise.ops.linear.same_bits import by_library, library_has_same_bits
from reprise.ops.linear.shared_sums_kernel import launch_product
from reprise.ops.rms_norm.triton import rms_norm


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes as in the reference."""
    if library_has_same_bits(x, weight, bias):
        return by_library(x, weight)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    launch_product(x, weight, bias, out)
    return out


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes as in the reference."""
    if library_has_same_bits(x, weight, bias, gated=True):
        return by_library(x, weight, gated=True)
    out = x.new_empty((x.shape[0], weight.shape[0] // 2))
    launch_product(x, weight, bias, out, gated=True)
    return out


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Shapes as in the reference."""
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Shapes as in the reference."""
    return gated_linear(rms_norm(x, norm_weight, eps), weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    """Shapes as in the reference."""
    if library_has_same_bits(x, weight, bias, residual=residual):
        by_library(x, weight, residual=residual)
        return
    launch_product(x, weight, bias, residual, add=True)


def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Shapes as in the reference."""
    launch_product(x, weight, None, out)
