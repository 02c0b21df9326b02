"""Products with a weight of four bits in Triton: of one row in plain arithmetic, of few rows on the
matrix units, of many with a plain weight that is made for the moment."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.w4_linear.dequantise_kernel import dequantise
from reprise.ops.w4_linear.few_rows_kernel import MOST_ROWS, launch_few_rows
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
    rows = x.shape[0]
    few = 1 < rows <= MOST_ROWS and x.dtype is not torch.float32
    if rows != 1 and not few:
        return F.linear(x, dequantise(packed, scales, zeros, group), bias)
    out = x.new_empty((rows, packed.shape[0]))
    (launch_few_rows if few else launch_row)(x, packed, scales, zeros, bias, out, group)
    return out
