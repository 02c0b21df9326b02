"""Functions of single numbers, made such that on a host the bits depend on the number alone.

torch's own sigmoid, SiLU and softplus compute what is left behind the last full vector of a tensor
with another exponential (C's) than the rest, so that the last numbers of a step have other bits
than they would have among others. ``exp`` and ``log1p`` give every number the same bits, wherever
it stands, and so does arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LINEAR = 20.0
"""Above it softplus is its argument, as in torch."""


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``; x is float32."""
    return torch.exp(-x).add_(1.0).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``; x is float32."""
    return x / torch.exp(-x).add_(1.0)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; x is float32."""
    return torch.where(x > _LINEAR, x, torch.log1p(torch.exp(x)))
