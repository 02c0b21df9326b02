"""Sparse mixtures of experts: a router, stacks of weights, an expert that all rows share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.cache import Batch
from reprise.distributed import ALONE, Share, own_experts
from reprise.errors import ModelError
from reprise.layers.build import Build
from reprise.layers.destination import Destination, Place
from reprise.layers.formats import Format
from reprise.layers.lazy import Normed, Product, tensor
from reprise.layers.linear import Linear, Run, Split, columns_of, format_of, rows_of, runs_of
from reprise.layers.mlp import GatedMLP
from reprise.layers.norm import RMSNorm
from reprise.ops.dispatch.reference import own_ids

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Routing:
    """How rows are sent to experts: what :func:`reprise.ops.route` takes."""

    experts: int
    """How many there are."""
    top: int
    """How many of them compute a row."""
    renormalize: bool = True
    scoring: str = "softmax"
    scale: float = 1.0


class Stack(nn.Module):
    """Products of equal sizes, one of each expert, side by side: what a checkpoint stores one by
    one, or as one tensor. Nobody else reads these weights.

    Args:
        build: How to make it. Its path is that of the experts in the checkpoint.
        count: Experts (E).
        in_features: Of each product.
        parts: Name of each projection that is computed as one with the others to its number of
            outputs, in the order in which the outputs are concatenated.
        merged: What the tensor of all experts is called where a checkpoint stores one
            (transformers' layout: [E, outputs of all parts, inputs]).
        split: Which features ranks share out, those of the output or of the input, unless whole
            experts are spread over them: see :class:`reprise.layers.Linear`. What it gives is a
            part of the sum then.
        beside: What is computed together with it, in its format.

    Raises:
        ModelError: Experts, or their projections, are stored in different formats.
    """

    def __init__(
        self,
        build: Build,
        count: int,
        in_features: int,
        parts: Mapping[str, int],
        merged: str,
        split: Split,
        beside: Stack | None = None,
    ) -> None:
        super().__init__()
        self.path, self.count, self.merged_name = build.path, count, merged
        self._own = _own(build, count)
        group = build.group if build.exchange is None else ALONE
        self._runs = runs_of(build, parts, group if split == "out" else ALONE)
        self.out_features = sum(each.size for each in self._runs)
        self.format = self._format(build, beside)
        shared = group if split == "in" else ALONE
        self._columns = columns_of(build, in_features, self.format, shared)
        self.in_features = self._columns.size
        made = self.format.stack(
            self._own.size, self.out_features, self.in_features, build.dtype, build.device
        )
        self.tensors: dict[str, Tensor] = {}
        """[E, ...] each, by the last part of their names in a checkpoint that has one for each
        expert."""
        for name, each in made.items():
            parameter = nn.Parameter(each, requires_grad=False)
            self.tensors[name] = parameter
            self.register_parameter(name, parameter)

    def _format(self, build: Build, beside: Stack | None) -> Format:
        first, *others = [format_of(build.at(f"{n}"), self._runs) for n in range(self.count)]
        if any(each is not first for each in others):
            raise ModelError(
                f"the experts of {build.path} are computed together and stored in different "
                "formats, which is not supported"
            )
        if beside is None or first is beside.format:
            return first
        # Where parts end within a block, what shares a scale is smaller there, and here as well.
        if first.merged(rows_of(beside._runs)) is beside.format:
            return beside.format
        raise ModelError(
            f"{', '.join(each.name for each in beside._runs)} and "
            f"{', '.join(each.name for each in self._runs)} of {build.path} are stored in "
            "different formats, which is not supported"
        )

    def destinations(self) -> Iterator[tuple[str, Place | None]]:
        """Each tensor of a checkpoint that has one for each expert, by its full name; None: it is
        another rank's."""
        runs = list(zip(self._runs, rows_of(self._runs), strict=True))
        own = self._own
        for expert in range(self.count):
            is_own = own.begin <= expert < own.begin + own.size
            # Others' have the same names: those of the first of ours.
            here = expert - own.begin if is_own else 0
            tensors = {name: each[here] for name, each in self.tensors.items()}
            for run, rows in runs:
                for name, place in self.format.stored(tensors, rows, self._columns):
                    yield f"{self.path}.{expert}.{run.name}.{name}", place if is_own else None

    def merged(self) -> Iterator[tuple[str, list[Place], list[str]]]:
        """Each tensor of a checkpoint that has one for all experts: its full name, where it goes,
        and the names in whose place it stands."""
        for name, each in self.tensors.items():
            pieces = [
                f"{self.path}.{n}.{run.name}.{name}"
                for n in range(self.count)
                for run in self._runs
            ]
            yield (
                f"{self.path}.{self.merged_name}{name.removeprefix('weight')}",
                list(self._of_all(each)),
                pieces,
            )

    def _of_all(self, tensor: Tensor) -> Iterator[Destination]:
        """Where the tensor of all experts [E, outputs, inputs] goes, of which there may be one
        entry for so many outputs and inputs."""
        own = self._own
        some = slice(None)
        if own.size < own.total:
            some = slice(own.begin, own.begin + own.size)
        columns = self._columns.per(tensor.shape[2])
        each = self.out_features // tensor.shape[1]
        stored = sum(run.total or run.size for run in self._runs) // each
        if stored == tensor.shape[1] and columns.size == columns.total:
            if own.size == own.total:
                yield Destination(tensor)
            else:
                yield Destination(tensor, (some,), (self.count, *tensor.shape[1:]))
            return
        begin = offset = 0
        for run in self._runs:
            size, total = run.size // each, (run.total or run.size) // each
            first = offset + run.begin // each
            part = (some, slice(first, first + size), columns.part)
            shape = (self.count, stored, columns.total)
            yield Destination(tensor[:, begin : begin + size], part, shape)
            begin, offset = begin + size, offset + total


def _own(build: Build, count: int) -> Share:
    """Which of so many experts this rank has weights of."""
    if build.exchange is None:
        return Share(0, count, count)
    return own_experts(build.group, build.exchange, count)


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
        self._own = _own(build, count)
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


class SparseMLP(nn.Module):
    """A feed-forward of many experts, of which a router chooses some for each row.

    Args:
        build: How to make it.
        hidden_size: Width of the residual stream.
        intermediate_size: Of each expert.
        routing: How rows are sent to experts.
        shared_size: Intermediate size of an expert that computes all rows, whose output a gate of
            its own scales; 0: there is none.
        names: What a checkpoint calls an expert's projections: gate, up, down.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        routing: Routing,
        *,
        shared_size: int = 0,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self.routing, self.group = routing, build.group
        router, gate = [Run("gate", 0, routing.experts)], [Run("shared_expert_gate", 0, 1)]
        self.shared_expert_gate: Linear | None = None
        if not shared_size:
            self.gate = Linear(build, hidden_size, router)
        elif format_of(build, router) is format_of(build, gate):
            # The shared expert's gate is one more row of the router.
            self.gate = Linear(build, hidden_size, [*router, *gate])
        else:  # such as where a list of what is left as it was names one of them
            self.gate = Linear(build, hidden_size, router)
            self.shared_expert_gate = Linear(build, hidden_size, gate)
        self.experts = Experts(
            build.at("experts"), routing.experts, hidden_size, intermediate_size, names
        )
        self.shared_expert: GatedMLP | None = None
        if shared_size:
            self.shared_expert = GatedMLP(build.at("shared_expert"), hidden_size, shared_size)

    def forward(self, x: Tensor | Normed, batch: Batch) -> Product:
        """x: [T, hidden_size]. Returns as much."""
        return Product(_Mixture(self, batch.query_start_loc[-1:]), tensor(x))

    def route(self, x: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and numbers of each row's experts, and the logits of all, [T, E] or [T, E + 1]
        with that of the shared expert's gate, if it is one more row of the router.

        Args:
            x: [T, hidden_size].
            live: [1] int32: rows from here on are padding.
        """
        routing, logits = self.routing, self.gate(x)
        weights = x.new_empty((len(x), routing.top), dtype=torch.float32)
        ids = x.new_empty((len(x), routing.top), dtype=torch.int32)
        ops.route(
            logits[:, : routing.experts], live, weights, ids,
            routing.scoring, routing.renormalize, routing.scale, None, None,
        )  # fmt: skip
        return weights, ids, logits

    def shared(self, x: Tensor, logits: Tensor) -> _Shared | None:
        """What the expert that computes all rows gives, if there is one."""
        if self.shared_expert is None:
            return None
        gate = logits[:, self.routing.experts :]
        if self.shared_expert_gate is not None:
            gate = self.shared_expert_gate(x)
        hidden = ops.sigmoid_and_mul(self.shared_expert.gate_up_proj.gated(x), gate)
        return _Shared(self.shared_expert.down_proj, hidden)


class _Shared(NamedTuple):
    """The product of the expert that computes all rows."""

    linear: Linear
    x: Tensor


class _Mixture(NamedTuple):
    """A :class:`SparseMLP` in a step: what of a Linear a Product needs."""

    mlp: SparseMLP
    live: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        result = self._partial(x)
        if self.mlp.group.size > 1:
            ops.all_reduce(result, self.mlp.group.name)
        return result

    def _partial(self, x: Tensor) -> Tensor:
        weights, ids, logits = self.mlp.route(x, self.live)
        result = self.mlp.experts(x, weights, ids)
        shared = self.mlp.shared(x, logits)
        if shared is not None:
            shared.linear.add_partial(shared.x, result)
        return result

    def add(self, x: Tensor, residual: Tensor) -> None:
        if self.mlp.group.size > 1:
            ops.all_reduce_add(self._partial(x), residual, self.mlp.group.name)
            return
        weights, ids, logits = self.mlp.route(x, self.live)
        shared = self.mlp.shared(x, logits)
        self.mlp.experts.add(x, weights, ids, residual)
        if shared is not None:
            shared.linear.add(shared.x, residual)

    def add_normed(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> Tensor | Normed:
        group = self.mlp.group
        if group.size > 1:
            partial = self._partial(x)
            return ops.all_reduce_add_norm(partial, residual, norm.weight, norm.eps, group.name)
        self.add(x, residual)
        return Normed(residual, norm)


@functools.cache
def _tell_if_slow(format: type[Format]) -> None:
    """Say it once of each format."""
    if format.grouped is Format.grouped:
        logger.warning(
            "experts: the format %s has no op for groups of rows, so every expert computes all "
            "rows and most of it is thrown away: right, and slow",
            format.__name__,
        )
