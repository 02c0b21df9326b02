from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.layers.build import Build
from reprise.layers.destination import Destination
from reprise.layers.unseen import looks_at_nothing


@looks_at_nothing
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


@looks_at_nothing
class CentredRMSNorm(RMSNorm):
    """Root mean square norm whose gains are stored as their distance from 1.

    They are kept as float32: in a shorter dtype the 1 would push out bits of the distance.

    Args:
        build: How to make it. Its path is the norm's in the checkpoint.
        size: Of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, build: Build, size: int, eps: float) -> None:
        super().__init__(replace(build, dtype=torch.float32), size, eps)
        self.path = build.path

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        yield f"{self.path}.weight", Destination(self.weight, offset=1.0)
