"""Residual streams, several in place of one (hyper-connections): see the op for the formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.layers.build import Build
from reprise.layers.destination import Destination
from reprise.layers.norm import RMSNorm


@dataclass(frozen=True)
class Mixing:
    """What all hyper-connections of a model have in common."""

    streams: int
    hidden_size: int
    iterations: int
    """How often columns of a matrix are normalised."""
    eps: float
    norm_eps: float


class Streams(NamedTuple):
    """The streams of a step between two sublayers, and what the last one is to be added with."""

    values: Tensor
    """[T, n, D]."""
    post: Tensor
    """[T, n] float32."""
    comb: Tensor
    """[T, n, n] float32."""

    @staticmethod
    def begin(embedded: Tensor, count: int) -> Streams:
        """Of no sublayer yet: what is added first, the embedding [T, D], is all that they are."""
        tokens, size = embedded.shape
        return Streams(
            embedded.new_zeros((tokens, count, size)),
            embedded.new_ones((tokens, count), dtype=torch.float32),
            embedded.new_zeros((tokens, count, count), dtype=torch.float32),
        )

    @staticmethod
    def kept(values: Tensor) -> Streams:
        """Streams [T, n, D] that are there already: what comes first is added to each."""
        tokens, count, _ = values.shape
        ones = values.new_ones((tokens, count), dtype=torch.float32)
        same = (
            torch.eye(count, dtype=torch.float32, device=values.device)
            .expand(tokens, -1, -1)
            .contiguous()
        )
        return Streams(values, ones, same)


class HyperConnection(nn.Module):
    """From one sublayer to the next: adds what the one gave, makes what the other reads.

    Args:
        build: How to make it; its path is the layer's.
        name: What its tensors' names in the checkpoint begin with.
        mixing: Sizes.
        norm: What the next sublayer's input is normalised with.
    """

    def __init__(self, build: Build, name: str, mixing: Mixing, norm: RMSNorm) -> None:
        super().__init__()
        count, self.mixing, self.path = mixing.streams, mixing, f"{build.path}.{name}"
        self.fn, self.base, self.scale = _parameters(build, (2 + count) * count, 3, mixing)
        # A tuple hides the norm, which is the layer's, from the walk over modules.
        self._norm = (norm,)

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        """See :func:`reprise.loading.destinations.destinations`."""
        return _destinations(self, self.path)

    def forward(self, streams: Streams, y: Tensor) -> Tensor:
        """The next sublayer's input [T, D].

        Args:
            streams: Changed in place.
            y: [T, D], what the sublayer before gave.
        """
        mixing = self.mixing
        return ops.hyper_connection(
            streams.values, self.fn, self.base, self.scale, self._norm[0].weight,
            mixing.iterations, mixing.eps, mixing.norm_eps, y, streams.post, streams.comb,
        )  # fmt: skip


class HyperHead(nn.Module):
    """Behind the last sublayer: adds what it gave, and makes one of the streams.

    Args:
        build: How to make it; its path is that in the checkpoint, up to the last name.
        mixing: Sizes.
    """

    def __init__(self, build: Build, mixing: Mixing) -> None:
        super().__init__()
        self.mixing, self.path = mixing, build.path
        self.fn, self.base, self.scale = _parameters(build, mixing.streams, 1, mixing)

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        """See :func:`reprise.loading.destinations.destinations`."""
        return _destinations(self, self.path)

    def forward(self, streams: Streams, y: Tensor) -> Tensor:
        """[T, D]; arguments as of :class:`HyperConnection`."""
        mixing = self.mixing
        return ops.hyper_head(
            streams.values, self.fn, self.base, self.scale, mixing.eps, mixing.norm_eps,
            y, streams.post, streams.comb,
        )  # fmt: skip


def wide_norm(build: Build, size: int, eps: float) -> RMSNorm:
    """A norm that multiplies in float32, whatever its gains are stored as."""
    return RMSNorm(replace(build, dtype=torch.float32), size, eps)


def _parameters(
    build: Build, factors: int, scales: int, mixing: Mixing
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """``fn``, ``base`` and ``scale``, float32 whatever the rest is."""
    shapes = (factors, mixing.streams * mixing.hidden_size), (factors,), (scales,)
    fn, base, scale = (
        torch.empty(shape, dtype=torch.float32, device=build.device) for shape in shapes
    )
    base.zero_()
    scale.fill_(1.0)
    return nn.Parameter(fn, False), nn.Parameter(base, False), nn.Parameter(scale, False)


def _destinations(
    module: HyperConnection | HyperHead, path: str
) -> Iterator[tuple[str, Destination]]:
    for name, each in (("fn", module.fn), ("base", module.base), ("scale", module.scale)):
        yield f"{path}_{name}", Destination(each)
