"""Products with a weight of four bits in Triton: of one row in plain arithmetic, of few rows on the
matrix units, of many with a plain weight that is made for the moment."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.rms_norm.triton import rms_norm
from reprise.ops.silu_and_mul.triton import silu_and_mul
from reprise.ops.w4_linear import arranged_kernel, few_rows_kernel
from reprise.ops.w4_linear.arrange_kernel import arrange
from reprise.ops.w4_linear.arranged_kernel import launch_arranged, step_of
from reprise.ops.w4_linear.dequantise_kernel import dequantise
from reprise.ops.w4_linear.few_rows_kernel import LEAST_GROUP, launch_few_rows
from reprise.ops.w4_linear.row_kernel import launch_row


def w4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """Shapes as in the reference."""
    if not _few(x):
        return F.linear(x, dequantise(packed, scales, zeros, group), bias)
    out = x.new_empty((x.shape[0], packed.shape[0]))
    _launch(x, packed, scales, zeros, bias, out, group)
    return out


def w4_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """Shapes as in the reference."""
    if not _few(x):
        return w4_linear(rms_norm(x, norm_weight, eps), packed, scales, zeros, bias, group)
    out = x.new_empty((x.shape[0], packed.shape[0]))
    _launch(x, packed, scales, zeros, bias, out, group, norm_weight, eps)
    return out


def w4_norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """Shapes as in the reference."""
    if _few(x):
        out = x.new_empty((x.shape[0], packed.shape[0] // 2))
        _launch(x, packed, scales, zeros, bias, out, group, norm_weight, eps, gated=True)
        return out
    normed = rms_norm(x, norm_weight, eps)
    product = w4_linear(normed, packed, scales, zeros, bias, group)
    del normed  # here a step has its peak of memory
    return silu_and_mul(product)


def w4_linear_add(
    x: Tensor,
    residual: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> None:
    """Shapes as in the reference."""
    if _few(x):
        _launch(x, packed, scales, zeros, bias, residual, group, add=True)
        return
    weight = dequantise(packed, scales, zeros, group)
    if bias is not None:
        residual.add_(bias)
    torch.addmm(residual, x, weight.t(), out=residual)


def _few(x: Tensor) -> bool:
    """Whether a kernel multiplies them with the weight as it is stored."""
    most = 1 if x.dtype is torch.float32 else arranged_kernel.MOST_ROWS
    return x.shape[0] <= most


def _launch(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    out: Tensor, group: int, norm_weight: Tensor | None = None, eps: float = 0.0, *,
    add: bool = False, gated: bool = False,
) -> None:  # fmt: skip
    if x.shape[0] == 0:
        return
    weight = packed, scales, zeros, bias, out, group
    if x.shape[0] == 1:
        launch_row(x, *weight, norm_weight, eps, add=add, gated=gated)
    elif _in_pieces(x, group):
        normed = x if norm_weight is None else rms_norm(x, norm_weight, eps)
        launch_few_rows(normed, *weight, add=add, gated=gated)
    else:
        arranged, sums = arrange(x, step_of(group), norm_weight, eps)
        launch_arranged(arranged, sums, *weight, add=add, gated=gated)


def _in_pieces(x: Tensor, group: int) -> bool:
    """Whether ``x`` is read in pieces of two elements, without a launch of its own before."""
    return (
        x.shape[0] <= few_rows_kernel.MOST_ROWS
        and group >= LEAST_GROUP
        and x.stride(0) % 2 == 0
        and x.data_ptr() % 4 == 0
    )
