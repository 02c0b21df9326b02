from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reprise import ops
from reprise.layers.build import Build
from reprise.layers.destination import Destination


class Embedding(nn.Module):
    """Token id to vector: [T] int64 to [T, hidden_size]. Each rank has some of the vectors.

    Args:
        build: How to make it.
        vocab_size: Of the model.
        hidden_size: Of a vector.
    """

    def __init__(self, build: Build, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self._group = build.group
        self._share, room = build.group.rows_of_vocabulary(vocab_size)
        weight = torch.empty(room, hidden_size, dtype=build.dtype, device=build.device)
        weight[self._share.size :] = 0
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.tensors: dict[str, Tensor] = {"weight": self.weight}
        """For the head of a model that ties it to the embedding."""

    def destination(self, weight: Tensor) -> Destination:
        """See :func:`reprise.loading.destinations.destinations`."""
        begin, size, total = self._share
        if self._group.size == 1:
            return Destination(weight)
        part = (slice(begin, begin + size),)
        return Destination(weight[:size], part, (total, *weight.shape[1:]))

    def forward(self, token_ids: Tensor) -> Tensor:
        if self._group.size == 1:
            return F.embedding(token_ids, self.weight)
        own = token_ids - self._share.begin
        foreign = (own < 0) | (own >= self._share.size)
        vectors = F.embedding(own.masked_fill(foreign, 0), self.weight)
        vectors.masked_fill_(foreign.unsqueeze(1), 0)
        ops.all_reduce(vectors, self._group.name)  # one rank's and zeros: exact
        return vectors
