"""Weights whose scales are powers of two (ue8m0): eight bits in blocks, four bits in groups of 32.

Scales are stored as exponents of eight bits. They are moved as bytes: not every device has numbers
of that kind, and a copy by value would lose what they mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise import ops
from reprise.layers.destination import Destination, Place
from reprise.layers.formats.base import Columns, Format, Rows
from reprise.layers.formats.dense import DENSE
from reprise.layers.formats.eight_bits import Blocks, spread
from reprise.layers.formats.fields import is_head, is_router, is_within
from reprise.ops.mxfp4_experts.reference import GROUP, NUMBERS, dequantise, powers

E8M0 = torch.float8_e8m0fnu
_ONE = 127
"""The exponent of 1."""


def _power(value: float) -> int:
    """The exponent whose power of two is nearest, by ratio."""
    return _ONE + round(math.log2(value))


class PowerBlocks(Blocks):
    """:class:`Blocks` whose scales a checkpoint stores as exponents. They are kept as the float32
    that they stand for, so what multiplies is the same. Activations are quantised in as many groups
    with scales that are any float32: they lose less than with the next power of two."""

    @functools.cache  # noqa: B019 - as many as there are layouts of parts
    def _of(self, computed_n: int) -> Blocks:
        return PowerBlocks(self.scale, self.block_n, self.block_k, computed_n)

    def stored(
        self, tensors: Mapping[str, Tensor], rows: Rows, columns: Columns
    ) -> Iterator[tuple[str, Place]]:
        for name, place in super().stored(tensors, rows, columns):
            if name == self.scale and isinstance(place, Destination):
                convert = functools.partial(_numbers, place.convert)
                place = place._replace(dtype=E8M0, convert=convert)
            yield name, place

    def fill_at_random(self, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
        super().fill_at_random(tensors, generator)
        if self.scale in tensors:
            tensors[self.scale].fill_(2.0 ** (_power(0.02 / spread()) - _ONE))


class Mxfp4(Format):
    """``weight`` [out_features, in_features / 2] int8, the low four bits first, and exponents of
    groups of 32 inputs, [out_features, in_features / 32]. Activations are not quantised.

    Args:
        scale: What checkpoints call the exponents.
    """

    grain = (1, GROUP)

    def __init__(self, scale: str) -> None:
        self.scale = scale

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        if in_features % GROUP:
            raise ValueError(f"{in_features} input features are no multiple of {GROUP}")
        return {
            "weight": torch.empty(out_features, in_features // 2, dtype=torch.int8, device=device),
            self.scale: torch.empty(
                out_features, in_features // GROUP, dtype=torch.uint8, device=device
            ),
        }

    def stored(
        self, tensors: Mapping[str, Tensor], rows: Rows, columns: Columns
    ) -> Iterator[tuple[str, Place]]:
        yield "weight", rows.of(tensors["weight"], columns)
        yield (
            self.scale,
            rows.of(tensors[self.scale], columns)._replace(dtype=E8M0, convert=_as_bytes),
        )

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        weight = dequantise(tensors["weight"], tensors[self.scale])
        return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)

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
        return ops.mxfp4_experts(x, weights, ids, *tensors, limit)

    def fill_at_random(self, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
        if "weight" in tensors:
            tensors["weight"].view(torch.uint8).random_(0, 256, generator=generator)
        if self.scale in tensors:
            size = math.sqrt(sum(each * each for each in NUMBERS) / len(NUMBERS))
            tensors[self.scale].fill_(_power(0.02 / size))


def _numbers(chosen: Callable[[Tensor], Tensor] | None, given: Tensor) -> Tensor:
    found = powers(given.view(torch.uint8))
    return found if chosen is None else chosen(found)


def _as_bytes(given: Tensor) -> Tensor:
    found = given.view(torch.uint8)
    if bool((found == 255).any()):
        # What moves bytes sees no number that is none.
        raise ValueError("an exponent is 255, which is no number: the checkpoint is damaged")
    return found


class PowersOfTwo:
    """The formats of a checkpoint of DeepSeek-V4: eight bits but for its experts, and plain numbers
    where a product decides what is looked at.

    Args:
        blocks: Of most products.
        experts: Of the experts of which a router chooses.
        plain: Names of modules that are plain besides.
    """

    def __init__(self, blocks: Format, experts: Format, plain: Sequence[str]) -> None:
        self._blocks, self._experts = blocks, experts
        self._plain = [*plain, "compressor", "weights_proj"]

    def of(self, path: str) -> Format:
        if is_head(path) or is_router(path) or is_within(path, self._plain):
            return DENSE
        return self._experts if is_within(path, ["experts"]) else self._blocks
