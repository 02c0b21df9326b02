from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from reprise.errors import ModelError
from reprise.layers.build import Build
from reprise.layers.destination import Destination
from reprise.layers.formats import DENSE, Format
from reprise.layers.lazy import Normed

Split = Literal["out", "in"]


class Run(NamedTuple):
    """Output features of a product that adjoin in it and in the checkpoint."""

    name: str
    """Of the projection that they are of, in the checkpoint."""
    begin: int
    """The first of them there."""
    size: int
    """How many there are."""


class Linear(nn.Module):
    """``x @ weight.T + bias``: [T, in_features] to [T, out_features]. Nobody else reads a weight.

    Args:
        build: How to make it. Its path is the product's name in the checkpoint, or, of a merged
            one, the name under which its parts stand.
        in_features: Of the product.
        out_features: Of the product. Several projections of the same input that are to be
            computed as one: name of each in the checkpoint to its number, in the order in which
            the outputs are concatenated. Where a checkpoint has their features in another order
            than the model wants them: the runs of which the outputs consist, in the model's order;
            together they have every feature of each projection once.
        split: Which features are shared out where several devices own the product together:
            those of the output or of the input. None: each has the whole.
        bias: It has a bias.
        tensors: Plain weights to use in place of new ones, such as an embedding's.

    Raises:
        ModelError: The formats of the parts do not allow to merge them.
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
    ) -> None:
        super().__init__()
        if split not in ("out", "in", None):
            raise ValueError(f"split={split!r} must be 'out', 'in' or None")
        self.path, self.split = build.path, split
        if isinstance(out_features, int):
            out_features = [Run("", 0, out_features)]
        elif isinstance(out_features, Mapping):
            out_features = [Run(name, 0, size) for name, size in out_features.items()]
        self.runs = list(out_features)
        self.out_features = sum(each.size for each in self.runs)
        self.format = DENSE if tensors is not None else format_of(build, self.runs)
        if tensors is None:
            tensors = self.format.tensors(self.out_features, in_features, build.dtype, build.device)
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
        return self.format.linear(x, self.tensors, self.bias)

    def gated(self, x: Tensor | Normed) -> Tensor:
        """``silu(first half) * second half`` of the product: [T, out_features / 2]."""
        if isinstance(x, Normed):
            norm = x.norm
            return self.format.norm_gated(x.x, norm.weight, norm.eps, self.tensors, self.bias)
        return self.format.gated(x, self.tensors, self.bias)

    def add(self, x: Tensor, residual: Tensor) -> None:
        """Add the product to ``residual`` [T, out_features], in place."""
        self.format.add(x, self.tensors, self.bias, residual)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the product into ``out`` [T, out_features]."""
        self.format.into(x, self.tensors, self.bias, out)

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        """Each tensor that a checkpoint has of this, by its full name there."""
        tensors = {**self.tensors} if self.bias is None else {**self.tensors, "bias": self.bias}
        stored: dict[str, int] = {}
        for run in self.runs:
            stored[run.name] = stored.get(run.name, 0) + run.size
        begin = 0
        for run in self.runs:
            path = f"{self.path}.{run.name}" if run.name else self.path
            for name, each in tensors.items():

                def rows(features: int, total: int = len(each)) -> int:
                    # There is one for each output, or for a few of them.
                    return features * total // self.out_features

                view = each[rows(begin) : rows(begin + run.size)]
                if run.size == stored[run.name]:
                    yield f"{path}.{name}", Destination(view)
                else:
                    part = slice(rows(run.begin), rows(run.begin + run.size))
                    shape = (rows(stored[run.name]), *each.shape[1:])
                    yield f"{path}.{name}", Destination(view, (part,), shape)
            begin += run.size


def format_of(build: Build, runs: Sequence[Run]) -> Format:
    """Of the product, of whose parts all must have the same."""
    paths = {each.name: build.at(each.name).path if each.name else build.path for each in runs}
    first, *others = [build.formats.of(path) for path in paths.values()]
    if any(each is not first for each in others):
        raise ModelError(
            f"{', '.join(paths.values())} are computed as one product and stored in different "
            "formats, which is not supported"
        )
    if len(runs) == 1:
        return first
    for name, begin, size in runs:
        if size % first.grain[0] or begin % first.grain[0]:
            where = f" from feature {begin} on" if begin else ""
            raise ModelError(
                f"{paths[name]} has {size} output features{where}, which must be a multiple of "
                f"{first.grain[0]} where it is stored in blocks and computed with others as one "
                "product"
            )
    return first
