from __future__ import annotations

from torch import Tensor, nn

from reprise import ops
from reprise.cache import Batch
from reprise.layers.build import Build
from reprise.layers.formats import Format
from reprise.layers.lazy import Normed, Product
from reprise.layers.linear import Linear
from reprise.layers.unseen import looks_at_nothing


@looks_at_nothing
class GatedMLP(nn.Module):
    """SwiGLU feed-forward: ``down(silu(gate(x)) * up(x))``.

    Args:
        build: How to make it.
        hidden_size: Of what it reads and gives.
        intermediate_size: Of gate and up.
        bias: The products have biases.
        names: What a checkpoint calls its projections: gate, up, down.
        limit: What gates and ups are clamped to, see :func:`reprise.ops.swiglu_clamp`; 0: they are
            not.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        limit: float = 0.0,
    ) -> None:
        super().__init__()
        self.limit = limit
        gate, up, down = names
        parts = {gate: intermediate_size, up: intermediate_size}
        self.gate_up_proj = Linear(build, hidden_size, parts, split="out", bias=bias)
        self.down_proj = Linear(
            build.at(down), intermediate_size, hidden_size, split="in", bias=bias
        )
        kind = type(self.gate_up_proj.format)
        self.norms = kind.gated is Format.gated and kind.norm_gated is not Format.norm_gated
        """Gates are one op with the norm before them, and two without it."""

    def forward(self, x: Tensor | Normed, batch: Batch) -> Product:
        """x: [T, hidden_size]. Returns as much. Reads nothing of the batch; others may."""
        return Product(self.down_proj, self.hidden(x))

    def hidden(self, x: Tensor | Normed) -> Tensor:
        """What the last product reads: [T, intermediate_size]."""
        if self.limit:
            return ops.swiglu_clamp(self.gate_up_proj(x), self.limit)
        return self.gate_up_proj.gated(x)
