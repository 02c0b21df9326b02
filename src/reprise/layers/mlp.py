from __future__ import annotations

from torch import Tensor, nn

from reprise import ops
from reprise.layers.build import Build
from reprise.layers.linear import Linear, MergedLinear
from reprise.layers.norm import RMSNorm


class GatedMLP(nn.Module):
    """SwiGLU feed-forward: ``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self, build: Build, hidden_size: int, intermediate_size: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedLinear(build, hidden_size, parts, bias=bias)
        self.down_proj = Linear(build, intermediate_size, hidden_size, bias=bias)

    def forward(self, residual: Tensor, norm: RMSNorm) -> None:
        """Add the feed-forward of ``norm(residual)`` to ``residual`` [T, hidden_size], in place."""
        up = self.gate_up_proj
        gated = ops.norm_gated_linear(residual, norm.weight, norm.eps, up.weight, up.bias)
        self.down_proj.add(gated, residual)
