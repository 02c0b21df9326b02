from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from reprise import ops
from reprise.layers.build import Build
from reprise.layers.lazy import Normed
from reprise.layers.linear import Linear, Run


class Head(Linear):
    """Hidden states to logits: [R, hidden_size] to [R, vocab_size].

    Each rank multiplies by the rows of some tokens, as many on each rank, those beyond the
    vocabulary being zeros. All get all logits, bit by bit the same, so that all draw alike.

    Args:
        build: How to make it. Its path is the product's name in the checkpoint.
        hidden_size: Width of the hidden states.
        vocab_size: Tokens.
        tensors: See :class:`reprise.layers.Linear`.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        vocab_size: int,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        share, room = build.group.rows_of_vocabulary(vocab_size)
        if tensors is not None:
            tensors = {name: _as_long(each, room) for name, each in tensors.items()}
        runs = [Run("", *share)]
        super().__init__(build, hidden_size, runs, split="out", tensors=tensors, room=room)
        self.vocab_size = vocab_size

    def forward(self, x: Tensor | Normed) -> Tensor:
        own = super().forward(x)
        if self.group.size == 1:
            return own
        out = own.new_empty((len(own), self.vocab_size))
        ops.all_gather(own, out, self.group.name)
        return out

    def into(self, x: Tensor, out: Tensor) -> None:
        if self.group.size == 1:
            super().into(x, out)
        else:
            ops.all_gather(super().forward(x), out, self.group.name)


def _as_long(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with rows of zeros behind it, so that it has so many."""
    return tensor if len(tensor) == rows else F.pad(tensor, (0, 0, 0, rows - len(tensor)))
