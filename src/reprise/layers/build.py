from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from reprise.distributed import ALONE, Group
from reprise.layers.formats import PLAIN, Formats


@dataclass(frozen=True)
class Build:
    """How layers are made: the first argument of every layer that has parameters.

    What else the making of layers comes to depend on is one more field here, never one more
    argument of every layer.
    """

    dtype: torch.dtype
    """Of activations, and of weights that are stored as plain numbers."""
    device: torch.device
    """Of all tensors; ``meta`` for sizes alone."""
    max_model_len: int
    """Longest context in tokens: what is tabulated by position has as many rows."""
    formats: Formats = PLAIN
    """Of the weights of products; :func:`reprise.models.build` reads them from the config."""
    path: str = ""
    """Where in the checkpoint the layer's tensors are."""
    cache_dtype: torch.dtype | None = None
    """Of keys and values in the cache where they are eight-bit codes with scales; None: they are
    numbers of ``dtype``."""
    num_drafts: int = 0
    """Most tokens that a step verifies behind a request's newest one: what does not count of them
    must leave no trace in a state."""
    group: Group = ALONE
    """The ranks that own the model together: each layer takes its own rank's part."""
    exchange: Group | None = None
    """Where whole experts are spread over ranks, those of this number in all groups like ours, each
    of which computes other rows; None: each rank of the group has a part of every expert."""

    def at(self, name: str) -> Build:
        """The build of a part of the layer, by its name in the checkpoint."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)
