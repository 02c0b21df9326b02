"""Experts as DeepSeek-V4 chooses them: by scores and a bias, or by the token itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.cache import Batch
from reprise.layers.build import Build
from reprise.layers.destination import Destination
from reprise.layers.experts import Experts
from reprise.layers.lazy import Normed, Product, tensor
from reprise.layers.linear import Linear
from reprise.layers.mlp import GatedMLP
from reprise.layers.norm import RMSNorm
from reprise.layers.sparse_mlp import Routing

NAMES = ("w1", "w3", "w2")
"""What checkpoints call an expert's projections: gate, up, down."""


class ScoredMLP(nn.Module):
    """Many experts, of which some compute each row, and one that computes all.

    Args:
        build: How to make it.
        hidden_size: Width of what it reads and gives.
        intermediate_size: Of each expert.
        routing: How rows are sent to experts.
        shared_size: Intermediate size of the expert that computes all rows.
        limit: See :class:`reprise.layers.GatedMLP`, of all of them.
        table_size: Tokens of the vocabulary, where a table of them says which experts compute a
            row; 0: the scores do, with a bias for the choice.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        routing: Routing,
        *,
        shared_size: int,
        limit: float,
        table_size: int = 0,
    ) -> None:
        super().__init__()
        self.routing, self.limit, self.path = routing, limit, build.path
        self.group = build.group
        self.gate = Linear(build.at("gate"), hidden_size, routing.experts)
        self.bias: Tensor | None = None
        table: Tensor | None = None
        if table_size:
            # Of weights that no checkpoint has: valid ones, all different in a row.
            first = torch.arange(table_size, device=build.device).unsqueeze(1)
            table = (first + torch.arange(routing.top, device=build.device)) % routing.experts
        else:
            zeros = torch.zeros(routing.experts, dtype=torch.float32, device=build.device)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        self.table: Tensor | None
        self.register_buffer("table", table)
        self.experts = Experts(
            build.at("experts"), routing.experts, hidden_size, intermediate_size, NAMES
        )
        self.shared_experts = GatedMLP(
            build.at("shared_experts"), hidden_size, shared_size, names=NAMES, limit=limit
        )

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        """See :func:`reprise.loading.destinations.destinations`."""
        if self.bias is not None:
            yield f"{self.path}.gate.bias", Destination(self.bias)
        if self.table is not None:
            check = functools.partial(_experts_that_are, self.routing.experts)
            yield f"{self.path}.gate.tid2eid", Destination(self.table, convert=check)

    def forward(self, x: Tensor | Normed, batch: Batch) -> Product:
        """x: [T, hidden_size]. Returns as much."""
        return Product(_Mixture(self, batch), tensor(x))


def _experts_that_are(count: int, table: Tensor) -> Tensor:
    """The table, of which an entry beyond the experts would be looked up in somebody's memory."""
    least, most = table.aminmax()
    if least < 0 or most >= count:
        raise ValueError(f"experts {int(least)} to {int(most)} of {count}: the table is damaged")
    return table


class _Mixture(NamedTuple):
    """A :class:`ScoredMLP` in a step: what of a Linear a Product needs."""

    mlp: ScoredMLP
    batch: Batch

    def __call__(self, x: Tensor) -> Tensor:
        result = self._partial(x)
        if self.mlp.group.size > 1:
            ops.all_reduce(result, self.mlp.group.name)
        return result

    def _partial(self, x: Tensor) -> Tensor:
        """What this rank's parts of the experts give."""
        mlp, batch = self.mlp, self.batch
        routing, logits = mlp.routing, mlp.gate.wide(x)
        weights = x.new_empty((len(x), routing.top), dtype=torch.float32)
        ids = x.new_empty((len(x), routing.top), dtype=torch.int32)
        chosen = None if mlp.table is None else mlp.table[batch.token_ids]
        ops.route(
            logits, batch.query_start_loc[-1:], weights, ids,
            routing.scoring, routing.renormalize, routing.scale, mlp.bias, chosen,
        )  # fmt: skip
        result = mlp.experts(x, weights, ids, mlp.limit)
        mlp.shared_experts.down_proj.add_partial(mlp.shared_experts.hidden(x), result)
        return result

    def add(self, x: Tensor, residual: Tensor) -> None:
        residual.add_(self(x))

    def add_normed(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> Normed:
        self.add(x, residual)
        return Normed(residual, norm)
