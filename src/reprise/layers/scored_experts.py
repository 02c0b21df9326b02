"""Experts as DeepSeek-V4 chooses them: by scores and a bias, or by the token itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.cache import Batch
from reprise.layers.build import Build
from reprise.layers.destination import Destination
from reprise.layers.experts import Experts
from reprise.layers.lazy import Normed, Product, tensor
from reprise.layers.linear import Linear
from reprise.layers.mixture import Mixture
from reprise.layers.mlp import GatedMLP
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
        return Product(Mixture(self, batch), tensor(x))

    def partial(self, x: Tensor, batch: Batch) -> Tensor:
        """See :class:`reprise.layers.mixture.Experts`."""
        routing, logits = self.routing, self.gate.wide(x)
        weights = x.new_empty((len(x), routing.top), dtype=torch.float32)
        ids = x.new_empty((len(x), routing.top), dtype=torch.int32)
        chosen = None if self.table is None else self.table[batch.token_ids]
        ops.route(
            logits, batch.query_start_loc[-1:], weights, ids,
            routing.scoring, routing.renormalize, routing.scale, self.bias, chosen,
        )  # fmt: skip
        result = self.experts(x, weights, ids, self.limit)
        self.shared_experts.down_proj.add_partial(self.shared_experts.hidden(x), result)
        return result

    def add_whole(self, x: Tensor, batch: Batch, residual: Tensor) -> None:
        """See :class:`reprise.layers.mixture.Experts`."""
        residual.add_(self.partial(x, batch))


def _experts_that_are(count: int, table: Tensor) -> Tensor:
    """The table, of which an entry beyond the experts would be looked up in other memory."""
    least, most = table.aminmax()
    if least < 0 or most >= count:
        raise ValueError(f"experts {int(least)} to {int(most)} of {count}: the table is damaged")
    return table
