"""A mixture of experts in a step: one product, of which each rank has a part."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from reprise import ops
from reprise.cache import Batch
from reprise.distributed import Group
from reprise.layers.lazy import Normed
from reprise.layers.norm import RMSNorm


class Experts(Protocol):
    """What of a layer of experts a :class:`Mixture` needs."""

    group: Group

    def partial(self, x: Tensor, batch: Batch) -> Tensor:
        """What this rank's parts of the experts give, [T, hidden_size]."""

    def add_whole(self, x: Tensor, batch: Batch, residual: Tensor) -> None:
        """Add what they give, where this rank has all of them, to ``residual`` in place."""


class Mixture(NamedTuple):
    """What of a Linear a :class:`reprise.layers.Product` needs."""

    experts: Experts
    batch: Batch

    def __call__(self, x: Tensor) -> Tensor:
        result, group = self.experts.partial(x, self.batch), self.experts.group
        if group.size > 1:
            ops.all_reduce(result, group.name)
        return result

    def add(self, x: Tensor, residual: Tensor) -> None:
        group = self.experts.group
        if group.size > 1:
            ops.all_reduce_add(self.experts.partial(x, self.batch), residual, group.name)
            return
        self.experts.add_whole(x, self.batch, residual)

    def add_normed(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> Tensor | Normed:
        group = self.experts.group
        if group.size > 1:
            partial = self.experts.partial(x, self.batch)
            return ops.all_reduce_add_norm(partial, residual, norm.weight, norm.eps, group.name)
        self.add(x, residual)
        return Normed(residual, norm)
