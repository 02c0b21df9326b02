from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.layers.norm import RMSNorm


class Linear(nn.Module):
    """``x @ weight.T + bias``: [T, in_features] to [T, out_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False
        )
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
            if bias
            else None
        )

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
        self,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias, dtype=dtype, device=device)
        self.parts = parts

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each part's tensors under the checkpoint's names, as views of the merged ones."""
        begin = 0
        for name, size in self.parts.items():
            yield f"{name}.weight", self.weight[begin : begin + size]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[begin : begin + size]
            begin += size
