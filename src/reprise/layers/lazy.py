"""Activations that are not computed yet: what a fused op may take together with what reads them.

A sublayer takes its input with the norm before it, and gives back its output as the product that
makes it. Its caller decides what becomes of both, so that a sublayer knows no residual stream:
added in place where there is one (:class:`Residual`), computed where there are several
(:func:`tensor`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from reprise.layers.norm import RMSNorm


class Projection(Protocol):
    """What of :class:`reprise.layers.Linear` a :class:`Product` needs."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor) -> None: ...

    def add_normed(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> Tensor | Normed: ...


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


class Residual:
    """The residual stream: what is added to it is computed when it is read next, together with the
    norm that reads it if that is cheaper.

    Args:
        values: [T, D], what is added to.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._added: Product | None = None

    def add(self, value: Tensor | Product) -> None:
        """Add it, at the latest when the stream is read."""
        values = self.values
        if isinstance(value, Product):
            self._added = value
        else:
            values.add_(value)

    @property
    def values(self) -> Tensor:
        """[T, D], with all that was added."""
        added, self._added = self._added, None
        if added is not None:
            added.linear.add(added.x, self._values)
        return self._values

    def normed(self, norm: RMSNorm, *, late: bool = False) -> Tensor | Normed:
        """The residual stream's norm, for a product that reads it. ``late``: that one computes it
        in any case."""
        if late or self._added is None:
            return Normed(self.values, norm)
        added, self._added = self._added, None
        return added.linear.add_normed(added.x, self._values, norm)
