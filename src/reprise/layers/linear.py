from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.distributed import ALONE, Group
from reprise.errors import ModelError
from reprise.layers.build import Build
from reprise.layers.destination import Place
from reprise.layers.formats import DENSE, Columns, Format, Rows
from reprise.layers.lazy import Normed
from reprise.layers.norm import RMSNorm
from reprise.layers.unseen import looks_at_nothing

Split = Literal["out", "in"]


class Run(NamedTuple):
    """Output features of a product that adjoin in it and in the checkpoint."""

    name: str
    """Of the projection that they are of, in the checkpoint."""
    begin: int
    """The first of them there."""
    size: int
    """How many there are."""
    total: int | None = None
    """All that it has there; None: what a product's runs of it have together."""


@looks_at_nothing
class Linear(nn.Module):
    """``x @ weight.T + bias``: [T, in_features] to [T, out_features]. No other layer reads a
    weight.

    Args:
        build: How to make it. Its path is the product's name in the checkpoint, or, of a merged
            one, the name under which its parts stand.
        in_features: Of the product.
        out_features: Of the product. Several projections of the same input that are to be
            computed as one: name of each in the checkpoint to its number, in the order in which
            the outputs are concatenated. Where a checkpoint has their features in another order
            than the model wants them: the runs of which the outputs consist, in the model's order;
            together they have every feature of each projection once.
        split: Which features are shared out where several ranks own the product together (the
            build's group): those of the output or of the input. None: each has the whole. Outputs
            by name are divided here; runs are this rank's already. What shares out its inputs has
            the whole number of them as ``in_features``, reads this rank's, and sums what it gives
            over the ranks.
        bias: It has a bias.
        tensors: Plain weights to use in place of new ones, such as an embedding's.
        room: Outputs that it has room for, where that is more than there are: those beyond are
            zeros. None: as many as there are.

    Raises:
        ModelError: The formats of the parts do not allow to merge them, or to share them out.
    """

    def __init__(
        self,
        build: Build,
        in_features: int,
        out_features: int | Mapping[str, int] | Sequence[Run],
        *,
        split: Split | None = None,
        bias: bool = False,
        tensors: Mapping[str, Tensor] | None = None,
        room: int | None = None,
    ) -> None:
        super().__init__()
        if split not in ("out", "in", None):
            raise ValueError(f"split={split!r} must be 'out', 'in' or None")
        self.path, self.split = build.path, split
        self.group: Group = build.group if split is not None else ALONE
        if isinstance(out_features, int):
            out_features = {"": out_features}
        if isinstance(out_features, Mapping):
            out_features = runs_of(build, out_features, self.group if split == "out" else ALONE)
        self.runs = list(out_features)
        self.out_features = room or sum(each.size for each in self.runs)
        self.format = DENSE if tensors is not None else format_of(build, self.runs)
        shared = self.group if split == "in" else ALONE
        self.columns = columns_of(build, in_features, self.format, shared)
        self.in_features = self.columns.size
        self._reduces = shared.size > 1
        if tensors is None:
            tensors = self.format.tensors(
                self.out_features, self.in_features, build.dtype, build.device
            )
        self.tensors: dict[str, Tensor] = {}
        """By the last part of their names in the checkpoint, without the bias."""
        for name, each in tensors.items():
            parameter = each if isinstance(each, nn.Parameter) else nn.Parameter(each, False)
            self.tensors[name] = parameter
            self.register_parameter(name, parameter)
        self.bias: Tensor | None = None
        if bias:
            zeros = torch.zeros(self.out_features, dtype=build.dtype, device=build.device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    def forward(self, x: Tensor | Normed) -> Tensor:
        if isinstance(x, Normed):
            norm = x.norm
            return self.format.norm_linear(x.x, norm.weight, norm.eps, self.tensors, self.bias)
        if self._reduces:
            result = self.partial(x)
            ops.all_reduce(result, self.group.name)
            return result
        return self.format.linear(x, self.tensors, self.bias)

    def partial(self, x: Tensor) -> Tensor:
        """What this rank's inputs give of the product; the bias is the first rank's."""
        return self.format.linear(x, self.tensors, self.bias if self.group.rank == 0 else None)

    def wide(self, x: Tensor) -> Tensor:
        """The product in float32, [T, out_features]; there is no bias."""
        return self.format.wide(x, self.tensors)

    def rotated_by_groups(
        self, x: Tensor, positions: Tensor, cos_sin: Tensor, groups: int
    ) -> Tensor:
        """Heads x [T, H, D] rotated back, see :func:`reprise.ops.rotary_tail`, then groups of
        outputs, each of the heads of its own: [T, out_features]; there is no bias."""
        return self.format.rotated_by_groups(x, positions, cos_sin, groups, self.tensors)

    def gated(self, x: Tensor | Normed) -> Tensor:
        """``silu(first half) * second half`` of the product: [T, out_features / 2]."""
        if isinstance(x, Normed):
            norm = x.norm
            return self.format.norm_gated(x.x, norm.weight, norm.eps, self.tensors, self.bias)
        return self.format.gated(x, self.tensors, self.bias)

    def add(self, x: Tensor, residual: Tensor) -> None:
        """Add the product to ``residual`` [T, out_features], in place."""
        if self._reduces:
            ops.all_reduce_add(self.partial(x), residual, self.group.name)
        else:
            self.format.add(x, self.tensors, self.bias, residual)

    def add_normed(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> Tensor | Normed:
        """:meth:`add`, and the norm of what ``residual`` is then, for what reads that next."""
        if self._reduces:
            group = self.group.name
            return ops.all_reduce_add_norm(self.partial(x), residual, norm.weight, norm.eps, group)
        self.add(x, residual)
        return Normed(residual, norm)

    def add_partial(self, x: Tensor, sum: Tensor) -> None:
        """Add what this rank's inputs give to ``sum`` [T, out_features], in place."""
        bias = self.bias if self.group.rank == 0 else None
        self.format.add(x, self.tensors, bias, sum)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the product into ``out`` [T, out_features]."""
        self.format.into(x, self.tensors, self.bias, out)

    def destinations(self) -> Iterator[tuple[str, Place]]:
        """Each tensor that a checkpoint has of this, by its full name there."""
        for run, rows in zip(self.runs, rows_of(self.runs, self.out_features), strict=True):
            path = f"{self.path}.{run.name}" if run.name else self.path
            places = dict(self.format.stored(self.tensors, rows, self.columns))
            if self.bias is not None:
                places["bias"] = rows.of(self.bias, self.columns)
            for name, each in places.items():
                yield f"{path}.{name}", each


def runs_of(build: Build, outputs: Mapping[str, int], group: Group) -> list[Run]:
    """A rank's part of each of some projections."""
    found = []
    for name, total in outputs.items():
        share = group.share(total, f"outputs of {build.at(name).path if name else build.path}")
        found.append(Run(name, share.begin, share.size, total))
    return found


def columns_of(build: Build, in_features: int, format: Format, group: Group) -> Columns:
    """A rank's part of a product's inputs."""
    what = f"inputs of {build.path}"
    return Columns(*group.share(in_features, what, format.grain[1] if group.size > 1 else 1))


def rows_of(runs: Sequence[Run], total: int | None = None) -> list[Rows]:
    """Where the runs of a product lie in it and in what is stored.

    Args:
        runs: In the product's order.
        total: Outputs of the product; None: the runs'.
    """
    stored: dict[str, int] = {}
    for run in runs:
        stored[run.name] = stored.get(run.name, 0) + run.size
    ends = list(itertools.accumulate(run.size for run in runs))
    return [
        Rows(end - run.size, run.size, total or ends[-1], run.begin, run.total or stored[run.name])
        for run, end in zip(runs, ends, strict=True)
    ]


def format_of(build: Build, runs: Sequence[Run]) -> Format:
    """The format of a product, whose parts must all have the same."""
    paths = {each.name: build.at(each.name).path if each.name else build.path for each in runs}
    first, *others = [build.formats.of(path) for path in paths.values()]
    if any(each is not first for each in others):
        raise ModelError(
            f"{', '.join(paths.values())} are computed as one product and stored in different "
            "formats, which is not supported"
        )
    if len(runs) == 1 and runs[0].total in (None, runs[0].size):
        return first
    try:
        return first.merged(rows_of(runs))
    except ValueError as error:
        raise ModelError(
            f"{', '.join(paths.values())} are computed in parts, of which one has {error}"
        ) from error
