"""Sparse mixtures of experts: a router, its experts, and one that all rows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.cache import Batch
from reprise.layers.build import Build
from reprise.layers.experts import Experts
from reprise.layers.lazy import Normed, Product, tensor
from reprise.layers.linear import Linear, Run, format_of
from reprise.layers.mixture import Mixture
from reprise.layers.mlp import GatedMLP


@dataclass(frozen=True)
class Routing:
    """How rows are sent to experts: what :func:`reprise.ops.route` takes."""

    experts: int
    """How many there are."""
    top: int
    """How many of them compute a row."""
    renormalize: bool = True
    scoring: str = "softmax"
    scale: float = 1.0


class SparseMLP(nn.Module):
    """A feed-forward of many experts, of which a router chooses some for each row.

    Args:
        build: How to make it.
        hidden_size: Width of the residual stream.
        intermediate_size: Of each expert.
        routing: How rows are sent to experts.
        shared_size: Intermediate size of an expert that computes all rows, whose output a gate of
            its own scales; 0: there is none.
        names: What a checkpoint calls an expert's projections: gate, up, down.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        routing: Routing,
        *,
        shared_size: int = 0,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self.routing, self.group = routing, build.group
        router, gate = [Run("gate", 0, routing.experts)], [Run("shared_expert_gate", 0, 1)]
        self.shared_expert_gate: Linear | None = None
        if not shared_size:
            self.gate = Linear(build, hidden_size, router)
        elif format_of(build, router) is format_of(build, gate):
            # The shared expert's gate is one more row of the router.
            self.gate = Linear(build, hidden_size, [*router, *gate])
        else:  # such as where a list of what is left as it was names one of them
            self.gate = Linear(build, hidden_size, router)
            self.shared_expert_gate = Linear(build, hidden_size, gate)
        self.experts = Experts(
            build.at("experts"), routing.experts, hidden_size, intermediate_size, names
        )
        self.shared_expert: GatedMLP | None = None
        if shared_size:
            self.shared_expert = GatedMLP(build.at("shared_expert"), hidden_size, shared_size)

    def forward(self, x: Tensor | Normed, batch: Batch) -> Product:
        """x: [T, hidden_size]. Returns as much."""
        return Product(Mixture(self, batch), tensor(x))

    def partial(self, x: Tensor, batch: Batch) -> Tensor:
        """See :class:`reprise.layers.mixture.Experts`."""
        weights, ids, logits = self.route(x, batch.query_start_loc[-1:])
        result = self.experts(x, weights, ids)
        shared = self.shared(x, logits)
        if shared is not None:
            shared.linear.add_partial(shared.x, result)
        return result

    def add_whole(self, x: Tensor, batch: Batch, residual: Tensor) -> None:
        """See :class:`reprise.layers.mixture.Experts`."""
        weights, ids, logits = self.route(x, batch.query_start_loc[-1:])
        shared = self.shared(x, logits)
        self.experts.add(x, weights, ids, residual)
        if shared is not None:
            shared.linear.add(shared.x, residual)

    def route(self, x: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and numbers of each row's experts, and the logits of all, [T, E] or [T, E + 1]
        with that of the shared expert's gate, if it is one more row of the router.

        Args:
            x: [T, hidden_size].
            live: [1] int32: rows from here on are padding.
        """
        routing, logits = self.routing, self.gate(x)
        weights = x.new_empty((len(x), routing.top), dtype=torch.float32)
        ids = x.new_empty((len(x), routing.top), dtype=torch.int32)
        ops.route(
            logits[:, : routing.experts], live, weights, ids,
            routing.scoring, routing.renormalize, routing.scale, None, None,
        )  # fmt: skip
        return weights, ids, logits

    def shared(self, x: Tensor, logits: Tensor) -> _Shared | None:
        """What the expert that computes all rows gives, if there is one."""
        if self.shared_expert is None:
            return None
        gate = logits[:, self.routing.experts :]
        if self.shared_expert_gate is not None:
            gate = self.shared_expert_gate(x)
        hidden = ops.sigmoid_and_mul(self.shared_expert.gate_up_proj.gated(x), gate)
        return _Shared(self.shared_expert.down_proj, hidden)


class _Shared(NamedTuple):
    """The product of the expert that computes all rows."""

    linear: Linear
    x: Tensor
