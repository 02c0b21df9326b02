from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reprise.layers.build import Build


class Embedding(nn.Module):
    """Token id to vector: [T] int64 to [T, hidden_size]."""

    def __init__(self, build: Build, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, dtype=build.dtype, device=build.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.tensors: dict[str, Tensor] = {"weight": self.weight}
        """For the head of a model that ties it to the embedding."""

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)
