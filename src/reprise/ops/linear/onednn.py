"""Matrix products on the CPU through oneDNN.

torch sends float32 products to MKL, which on processors of other makers than Intel is slower
than oneDNN for the rows of a decode step (up to 1.7 times at 16 rows, equal from about 64 on). A
call of oneDNN takes some 25 us more, which small weights do not make good, and it keeps half a
megabyte for each number of rows that a weight was multiplied by: with prompts of any length that
would be a gigabyte. Processors without instructions for a narrower type have no oneDNN kernels for
it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.silu_and_mul.reference import reference as silu_and_mul

_FEW_ROWS = 64
LARGE = 1 << 18
"""Numbers in a weight: of smaller ones MKL is faster with any number of rows."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    few = x.shape[0] <= _FEW_ROWS
    if x.dtype is not torch.float32 or not few or weight.numel() < LARGE:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return silu_and_mul(norm_linear(x, norm_weight, eps, weight, bias))


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    residual.add_(linear(x, weight, bias))


def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_(linear(x, weight, None))
