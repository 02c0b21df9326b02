from __future__ import annotations

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.layers.build import Build


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension."""

    def __init__(self, build: Build, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.ones(size, dtype=build.dtype, device=build.device), requires_grad=False
        )
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
