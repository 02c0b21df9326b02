from __future__ import annotations

from torch import Tensor, nn

from reprise.cache import Batch
from reprise.layers.build import Build
from reprise.layers.lazy import Normed, Product
from reprise.layers.linear import Linear


class GatedMLP(nn.Module):
    """SwiGLU feed-forward: ``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self, build: Build, hidden_size: int, intermediate_size: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear(build, hidden_size, parts, split="out", bias=bias)
        self.down_proj = Linear(
            build.at("down_proj"), intermediate_size, hidden_size, split="in", bias=bias
        )

    def forward(self, x: Tensor | Normed, batch: Batch) -> Product:
        """x: [T, hidden_size]. Returns as much. Reads nothing of the batch; others may."""
        return Product(self.down_proj, self.gate_up_proj.gated(x))
