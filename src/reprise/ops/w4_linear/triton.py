"""Products with a weight of four bits in Triton: of one row in plain arithmetic, of few rows on the
matrix units, of many with a plain weight that is made for the moment."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.rms_norm.triton import rms_norm
from reprise.ops.silu_and_mul.triton import silu_and_mul
from reprise.ops.w4_linear.dequantise_kernel import dequantise
from reprise.ops.w4_linear.few_rows_kernel import LEAST_GROUP, MOST_ROWS, launch_few_rows
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
    if not _few(x, group):
        return F.linear(x, dequantise(packed, scales, zeros, group), bias)
    out = x.new_empty((x.shape[0], packed.shape[0]))
    _launch(x)(x, packed, scales, zeros, bias, out, group)
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
    if x.shape[0] != 1:
        return w4_linear(rms_norm(x, norm_weight, eps), packed, scales, zeros, bias, group)
    out = x.new_empty((1, packed.shape[0]))
    launch_row(x, packed, scales, zeros, bias, out, group, norm_weight, eps)
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
    out = x.new_empty((x.shape[0], packed.shape[0] // 2))
    if x.shape[0] == 1:
        launch_row(x, packed, scales, zeros, bias, out, group, norm_weight, eps, gated=True)
        return out
    normed = rms_norm(x, norm_weight, eps)
    if _few(x, group):
        launch_few_rows(normed, packed, scales, zeros, bias, out, group, gated=True)
        return out
    del out
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
    if _few(x, group):
        _launch(x)(x, packed, scales, zeros, bias, residual, group, add=True)
        return
    weight = dequantise(packed, scales, zeros, group)
    if bias is not None:
        residual.add_(bias)
    torch.addmm(residual, x, weight.t(), out=residual)


def _few(x: Tensor, group: int) -> bool:
    """Whether a kernel multiplies them with the weight as it is stored."""
    return x.shape[0] == 1 or (
        1 < x.shape[0] <= MOST_ROWS
        and x.dtype is not torch.float32
        and group >= LEAST_GROUP
        and x.stride(0) % 2 == 0
        and x.data_ptr() % 4 == 0
    )


def _launch(x: Tensor) -> Callable[..., None]:
    return launch_row if x.shape[0] == 1 else launch_few_rows
