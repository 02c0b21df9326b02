"""Weights of many experts, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from reprise.distributed import ALONE, Share, own_experts
from reprise.errors import ModelError
from reprise.layers.build import Build
from reprise.layers.destination import Destination, Place
from reprise.layers.formats import Format
from reprise.layers.linear import Split, columns_of, format_of, rows_of, runs_of


class Stack(nn.Module):
    """Products of equal sizes, one of each expert, side by side: what a checkpoint stores one by
    one, or as one tensor. No other layer reads these weights.

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
        self._own = own_share(build, count)
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


def own_share(build: Build, count: int) -> Share:
    """Which of so many experts this rank has weights of."""
    if build.exchange is None:
        return Share(0, count, count)
    return own_experts(build.group, build.exchange, count)
