"""Activations that are not computed yet: what a fused op may take together with what reads them.

A sublayer takes its input with the norm before it, and gives back its output as the product that
makes it. Who calls it decides what becomes of both, so that a sublayer knows no residual stream:
added in place where there is one (:func:`add`), computed where there are several (:func:`tensor`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from reprise.layers.norm import RMSNorm


class Projection(Protocol):
    """What of :class:`reprise.layers.Linear` a :class:`Product` needs."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor) -> None: ...


class Normed(NamedTuple):
    """``norm(x)``, for the product that reads it."""

    x: Tensor
    norm: RMSNorm


class Product(NamedTuple):
    """``linear(x)``, for the sum that takes it."""

    linear: Projection
    x: Tensor


def tensor(value: Tensor | Normed | Product) -> Tensor:
    """The value, computed now."""
    if isinstance(value, Normed):
        return value.norm(value.x)
    if isinstance(value, Product):
        return value.linear(value.x)
    return value


def add(residual: Tensor, value: Tensor | Product) -> None:
    """Add the value to ``residual``, in place."""
    if isinstance(value, Product):
        value.linear.add(value.x, residual)
    else:
        residual.add_(value)
