"""Weights of four bits, and activations as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reprise import ops
from reprise.layers.formats.base import ALL_INPUTS, Columns, Format

SPREAD = 4.61
"""Standard deviation of the numbers from 0 to 15."""


class FourBits(Format):
    """``packed``, ``scales`` and ``zeros``, as :func:`reprise.ops.w4_linear` has them: one layout,
    whatever a checkpoint's is. A method's file says how they are made of what is stored.

    Args:
        group: Inputs that share a scale; None: all.
        zeros: What stands for zero is stored; else it is the middle, 8.
    """

    outputs_together = 1
    """In a word of what is stored."""

    def __init__(self, group: int | None, *, zeros: bool) -> None:
        self.group, self.zeros = group, zeros
        self.grain = (self.outputs_together, math.lcm(8, group or 8))

    def groups(self, in_features: int) -> int:
        """Scales of an output."""
        return -(-in_features // (self.group or in_features))

    def group_columns(self, columns: Columns) -> Columns:
        """Inputs counted in groups."""
        if self.group is None:
            return ALL_INPUTS
        return columns.per(self.groups(columns.size))

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        size = out_features, self.groups(in_features)
        words = -(-in_features // 8)
        found = {
            "packed": torch.empty(out_features, words, dtype=torch.int32, device=device),
            "scales": torch.empty(size, dtype=dtype, device=device),
        }
        if self.zeros:
            found["zeros"] = torch.empty(size, dtype=torch.uint8, device=device)
        return found

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return ops.w4_linear(x, *self._product(x, tensors, bias))

    def norm_linear(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        return ops.w4_norm_linear(x, norm_weight, eps, *self._product(x, tensors, bias))

    def norm_gated(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        return ops.w4_norm_gated_linear(x, norm_weight, eps, *self._product(x, tensors, bias))

    def add(
        self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, residual: Tensor
    ) -> None:
        ops.w4_linear_add(x, residual, *self._product(x, tensors, bias))

    def _product(
        self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """What all of these ops take last."""
        group = self.group or -(-x.shape[1] // 8) * 8
        return tensors["packed"], tensors["scales"], tensors.get("zeros"), bias, group

    def fill_at_random(self, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
        for name, each in tensors.items():
            if name == "packed":
                each.view(torch.uint8).random_(0, 256, generator=generator)
            else:
                each.fill_(8 if name == "zeros" else 0.02 / SPREAD)
