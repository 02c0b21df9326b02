from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.layers.build import Build
from reprise.layers.norm import RMSNorm


class Linear(nn.Module):
    """``x @ weight.T + bias``: [T, in_features] to [T, out_features]."""

    def __init__(
        self, build: Build, in_features: int, out_features: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": build.dtype, "device": build.device}
        weight = torch.empty(out_features, in_features, **options)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, **options), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def of_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Of ``norm(x)``."""
        return ops.norm_linear(x, norm.weight, norm.eps, self.weight, self.bias)

    def add(self, x: Tensor, residual: Tensor) -> None:
        """Add the projection of ``x`` to ``residual`` [T, out_features], in place."""
        ops.linear_add(x, self.weight, self.bias, residual)


class MergedLinear(Linear):
    """Several projections of the same input computed as one.

    Args:
        parts: Name of each projection in the checkpoint (a sibling of this module) to its number
            of output features, in the order in which the outputs are concatenated.
    """

    def __init__(
        self, build: Build, in_features: int, parts: dict[str, int], *, bias: bool = False
    ) -> None:
        super().__init__(build, in_features, sum(parts.values()), bias=bias)
        self.parts = parts

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each part's tensors under the checkpoint's names, as views of the merged ones."""
        begin = 0
        for name, size in self.parts.items():
            yield f"{name}.weight", self.weight[begin : begin + size]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[begin : begin + size]
            begin += size
