"""Weights of eight bits, float8_e4m3fn, and activations that are quantised to as many."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from reprise import ops
from reprise.layers.destination import Destination, Place
from reprise.layers.formats.base import ALL_INPUTS, Columns, Format, Rows

FP8 = torch.float8_e4m3fn


class EightBits(Format):
    """``weight`` [out_features, in_features], and what its blocks are multiplied by, float32.

    Args:
        scale: What checkpoints call the scales.
    """

    def __init__(self, scale: str) -> None:
        self.scale = scale

    @abstractmethod
    def blocks(self, in_features: int) -> tuple[int, int]:
        """Outputs and inputs that share a scale."""

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        block_n, block_k = self.blocks(in_features)
        scales = -(-out_features // block_n), -(-in_features // block_k)
        return {
            "weight": torch.empty(out_features, in_features, dtype=FP8, device=device),
            self.scale: torch.empty(scales, dtype=torch.float32, device=device),
        }

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return ops.fp8_linear(x, *self._product(x, tensors, bias))

    def norm_linear(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        return ops.fp8_norm_linear(x, norm_weight, eps, *self._product(x, tensors, bias))

    def norm_gated(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        return ops.fp8_norm_gated_linear(x, norm_weight, eps, *self._product(x, tensors, bias))

    def add(
        self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, residual: Tensor
    ) -> None:
        ops.fp8_linear_add(x, residual, *self._product(x, tensors, bias))

    def rotated_by_groups(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        groups: int,
        tensors: Mapping[str, Tensor],
    ) -> Tensor:
        weight = tensors["weight"]
        block_n, block_k = self.blocks(weight.shape[1])
        return ops.fp8_rotated_output(
            x, positions, cos_sin, weight, tensors[self.scale], groups, block_n, block_k
        )

    def _product(
        self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
        """What all of these ops take last."""
        block_n, block_k = self.blocks(x.shape[1])
        return tensors["weight"], tensors[self.scale], bias, block_n, block_k

    def grouped(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        limit: float = 0.0,
    ) -> Tensor:
        tensors = gate_up["weight"], gate_up[self.scale], down["weight"], down[self.scale]
        return ops.fp8_experts(x, weights, ids, *tensors, *self.blocks(0), limit)

    def fill_at_random(self, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
        if "weight" in tensors:
            bits = tensors["weight"].view(torch.uint8)
            bits.random_(0, 256, generator=generator)
            # Seven ones are no number.
            bits.sub_(((bits & 127) == 127).to(torch.uint8))
        if self.scale in tensors:
            tensors[self.scale].fill_(0.02 / spread())


class Blocks(EightBits):
    """A scale for each block of outputs and inputs, of which the last ones may be cut off.

    Args:
        scale: See :class:`EightBits`.
        block_n: Outputs of a block, as stored.
        block_k: Inputs of a block, and of a group of activations.
        computed_n: Outputs that share a scale as the product has them; None: ``block_n``.
    """

    def __init__(
        self, scale: str, block_n: int, block_k: int, computed_n: int | None = None
    ) -> None:
        super().__init__(scale)
        self.block_n, self.block_k = block_n, block_k
        self.grain = (1, block_k)
        self.computed_n = computed_n or block_n

    def blocks(self, in_features: int) -> tuple[int, int]:
        return self.computed_n, self.block_k

    def merged(self, rows: Sequence[Rows]) -> Format:
        """Where a part ends within a block, what shares a scale is smaller in the product."""
        places = [each for row in rows for each in (row.begin, row.stored_begin)]
        common = math.gcd(self.block_n, *places)
        return self if common == self.block_n else self._of(common)

    @functools.cache  # noqa: B019 - as many as there are layouts of parts
    def _of(self, computed_n: int) -> Blocks:
        return Blocks(self.scale, self.block_n, self.block_k, computed_n)

    def stored(
        self, tensors: Mapping[str, Tensor], rows: Rows, columns: Columns
    ) -> Iterator[tuple[str, Place]]:
        yield "weight", rows.of(tensors["weight"], columns)
        step = self.computed_n
        first, last = rows.begin // step, -(-(rows.begin + rows.size) // step)
        scale = tensors[self.scale][first:last]
        features = range(rows.stored_begin, rows.stored_begin + rows.size, step)
        chosen = [each // self.block_n for each in features]
        inputs = columns.per(scale.shape[1])
        shape = (-(-rows.stored_total // self.block_n), inputs.total)
        part = (slice(None), inputs.part)
        if chosen == list(range(shape[0])):
            yield self.scale, Destination(scale, part, shape)
        else:
            yield self.scale, Destination(scale, part, shape, convert=lambda given: given[chosen])


class Channels(EightBits):
    """A scale for each output, and for each row of activations.

    Args:
        scale: See :class:`EightBits`.
        whole: Checkpoints have one for all outputs of a projection.
    """

    def __init__(self, scale: str, *, whole: bool) -> None:
        super().__init__(scale)
        self.whole = whole

    def blocks(self, in_features: int) -> tuple[int, int]:
        return 1, in_features

    def stored(
        self, tensors: Mapping[str, Tensor], rows: Rows, columns: Columns
    ) -> Iterator[tuple[str, Place]]:
        yield "weight", rows.of(tensors["weight"], columns)
        scale = rows.of(tensors[self.scale], ALL_INPUTS)
        if self.whole:
            target, size = scale.target, rows.size
            scale = Destination(
                target, shape=(1,), convert=lambda given: given.reshape(1, 1).expand(size, 1)
            )
        yield self.scale, scale


@functools.cache
def spread() -> float:
    """Root mean square of all numbers of eight bits."""
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    return float(every[every.isfinite()].square().mean().sqrt())
