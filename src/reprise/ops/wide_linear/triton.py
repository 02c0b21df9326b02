"""A product that is not rounded in Triton: that of one group, with results in float32. What the
matrix units multiply is exact, and they sum in float32."""

import torch
from torch import Tensor

from reprise.ops.grouped_output.product_kernel import launch_groups


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Shapes as in the reference."""
    out = x.new_empty((len(x), len(weight)), dtype=torch.float32)
    launch_groups((x if x.stride(1) == 1 else x.contiguous()).unsqueeze(1), weight, out)
    return out
