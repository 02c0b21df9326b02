from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from reprise.errors import ModelError
from reprise.layers.build import Build
from reprise.layers.destination import Destination
from reprise.layers.formats import DENSE, Format
from reprise.layers.lazy import Normed

Split = Literal["out", "in"]


class Linear(nn.Module):
    """``x @ weight.T + bias``: [T, in_features] to [T, out_features]. Nobody else reads a weight.

    Args:
        build: How to make it. Its path is the product's name in the checkpoint, or, of a merged
            one, the name under which its parts stand.
        in_features: Of the product.
        out_features: Of the product. Several projections of the same input that are to be
            computed as one: name of each in the checkpoint to its number, in the order in which
            the outputs are concatenated.
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
        out_features: int | Mapping[str, int],
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
            self.parts, self.out_features = None, out_features
        else:
            self.parts, self.out_features = dict(out_features), sum(out_features.values())
        self.format = DENSE if tensors is not None else _format(build, self.parts)
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
        parts = {"": self.out_features} if self.parts is None else self.parts
        begin = 0
        for part, size in parts.items():
            path = f"{self.path}.{part}" if part else self.path
            for name, each in tensors.items():
                rows = len(each)  # one for each output, or for a few of them
                view = each[begin * rows // self.out_features :][: size * rows // self.out_features]
                yield f"{path}.{name}", Destination(view)
            begin += size


def _format(build: Build, parts: Mapping[str, int] | None) -> Format:
    """Of the product, of whose parts all must have the same."""
    paths = [build.path] if parts is None else [build.at(name).path for name in parts]
    first, *others = [build.formats.of(path) for path in paths]
    if any(each is not first for each in others):
        raise ModelError(
            f"{', '.join(paths)} are computed as one product and stored in different formats, "
            "which is not supported"
        )
    for path, size in zip(paths, (parts or {}).values(), strict=False):
        if size % first.grain[0]:
            raise ModelError(
                f"{path} has {size} output features, which must be a multiple of {first.grain[0]} "
                "where it is stored in blocks and computed with others as one product"
            )
    return first
