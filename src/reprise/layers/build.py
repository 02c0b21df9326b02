from __future__ import annotations

from dataclasses import dataclass

import torch


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
