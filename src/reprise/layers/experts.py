"""Feed-forwards of which each row is computed by some, wherever their weights are."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.distributed import ALONE
from reprise.layers.build import Build
from reprise.layers.formats import Format
from reprise.layers.stack import Stack, own_share
from reprise.ops.dispatch.reference import own_ids

logger = logging.getLogger(__name__)


class Experts(nn.Module):
    """SwiGLU feed-forwards of which each row is computed by some.

    Where several ranks compute a model together, each has some of the intermediate features of
    every expert, or, if the build says so, some experts as a whole. Either way what it gives is a
    part of the sum over the build's group. Ranks of other groups may have experts for its rows:
    these are sent there and back.

    Args:
        build: How to make it.
        count: Experts.
        hidden_size: Width of the residual stream.
        intermediate_size: Of each expert.
        names: What a checkpoint calls an expert's projections: gate, up, down.
    """

    def __init__(
        self,
        build: Build,
        count: int,
        hidden_size: int,
        intermediate_size: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        gate, up, down = names
        parts = {gate: intermediate_size, up: intermediate_size}
        self.gate_up_proj = Stack(build, count, hidden_size, parts, "gate_up_proj", "out")
        self.down_proj = Stack(
            build, count, intermediate_size, {down: hidden_size}, "down_proj", "in",
            self.gate_up_proj,
        )  # fmt: skip
        self.format = self.gate_up_proj.format
        self.count = count
        self.load: tuple[Tensor] | None = None
        """[count] int64: rows that each expert gets are added there; nothing: they are not counted.
        In a tuple, since it is no weight."""
        self._own = own_share(build, count)
        self._exchange = build.exchange or ALONE
        self._stride = self._own.size * build.group.size
        """From this rank's first expert to that of the next rank that it exchanges rows with."""
        _tell_if_slow(type(self.format))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, limit: float = 0.0) -> Tensor:
        """See :meth:`reprise.layers.formats.Format.grouped`; ids are numbers among all experts."""
        self._note(ids)
        stacks = self.gate_up_proj.tensors, self.down_proj.tensors
        own, group = self._own, self._exchange
        if own.size == own.total:
            return self.format.grouped(x, weights, ids, *stacks, limit)
        if group.size == 1:
            ids = own_ids(ids, own.begin, own.size)
            return self.format.grouped(x, weights, ids, *stacks, limit)
        x = x.contiguous()
        count = group.size * len(x)
        rows = x.new_empty(count, x.shape[1])
        rows_weights = weights.new_empty(count, weights.shape[1])
        rows_ids = ids.new_empty(count, ids.shape[1])
        where = own.begin, own.size, self._stride
        ops.dispatch(x, weights, ids, *where, rows, rows_weights, rows_ids, group.name)
        given = self.format.grouped(rows, rows_weights, rows_ids, *stacks, limit)
        out = torch.empty_like(x)
        ops.combine(given, rows_ids, ids, *where, out, group.name)
        return out

    def _note(self, ids: Tensor) -> None:
        if self.load is not None:
            ops.expert_load(ids, *self.load)

    def add(self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor) -> None:
        """Add it to ``residual`` [T, hidden_size], in place."""
        if self._own.size < self._own.total:
            residual.add_(self(x, weights, ids))
            return
        self._note(ids)
        stacks = self.gate_up_proj.tensors, self.down_proj.tensors
        self.format.grouped_add(x, weights, ids, *stacks, residual)


@functools.cache
def _tell_if_slow(format: type[Format]) -> None:
    """Say it once of each format."""
    if format.grouped is Format.grouped:
        logger.warning(
            "experts: the format %s has no op for groups of rows, so every expert computes all "
            "rows and most of it is thrown away: right, and slow",
            format.__name__,
        )
