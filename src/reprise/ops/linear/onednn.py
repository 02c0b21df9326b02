"""Matrix products on the CPU through oneDNN.

torch sends float32 products to MKL, which on processors of other makers than Intel is several
times slower than oneDNN for the 2 to 64 rows of a decode step. Processors without instructions for
a narrower type have no oneDNN kernels for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype is not torch.float32:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
