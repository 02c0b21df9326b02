"""Matrix products on the CPU, by whatever of torch's ways is fastest for the rows of a decode step.

torch sends float32 products to MKL, which on processors of other makers than Intel is slower
than oneDNN for the rows of a decode step (up to 1.7 times at 16 rows, equal from about 64 on). A
call of oneDNN takes some 25 us more, which small weights do not make good, and it keeps half a
megabyte for each number of rows that a weight was multiplied by: with prompts of any length that
would be a gigabyte.

Where the processor has instructions for bfloat16, oneDNN lays the right operand out anew in each
call, which takes half as long as the product. So of a few rows the weight is made the left one, and
one row is a product of the weight and a vector: 35 instead of 52 ms for all weights of a model of
135M, of which reading them takes 33, and a quarter less time for 2 to 16 rows (one thread, AVX-512
with AMX). Without such instructions there are no kernels of oneDNN for it.
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
HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias).contiguous()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, N], in some layout."""
    rows, large = x.shape[0], weight.numel() >= LARGE
    if 0 < rows <= _FEW_ROWS:
        if x.dtype is torch.float32 and large:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        if x.dtype is torch.bfloat16 and HAS_BFLOAT16 and (large or rows == 1):
            return _weight_first(x, weight, bias)
    return F.linear(x, weight, bias)


def _weight_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 1:
        row = x[0]
        product = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return product.unsqueeze(0)
    columns = x.t()
    if bias is None:
        return torch.mm(weight, columns).t()
    return torch.addmm(bias.unsqueeze(1), weight, columns).t()


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return silu_and_mul(_product(x, weight, bias).contiguous())


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return silu_and_mul(norm_linear(x, norm_weight, eps, weight, bias))


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    residual.add_(_product(x, weight, bias))


def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_(_product(x, weight, None))
