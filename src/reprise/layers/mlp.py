from __future__ import annotations

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.layers.linear import Linear, MergedLinear


class GatedMLP(nn.Module):
    """SwiGLU feed-forward: ``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedLinear(hidden_size, parts, bias=bias, dtype=dtype, device=device)
        self.down_proj = Linear(
            intermediate_size, hidden_size, bias=bias, dtype=dtype, device=device
        )

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden_size] to [T, hidden_size]."""
        return self.down_proj(ops.silu_and_mul(self.gate_up_proj(x)))
