"""Weights of four bits, and activations as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reprise import ops
from reprise.layers.formats.base import Format

SPREAD = 4.61
"""Standard deviation of the numbers from 0 to 15."""


class FourBits(Format):
    """``packed``, ``scales`` and ``zeros``, as :func:`reprise.ops.w4_linear` has them: one layout,
    whatever a checkpoint's is. A method's file says how they are made of what is stored.

    Args:
        group: Inputs that share a scale; None: all.
        zeros: What stands for zero is stored; else it is the middle, 8.
    """

    def __init__(self, group: int | None, *, zeros: bool) -> None:
        self.group, self.zeros = group, zeros

    def groups(self, in_features: int) -> int:
        """Scales of an output."""
        return -(-in_features // (self.group or in_features))

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
        group = self.group or -(-x.shape[1] // 8) * 8
        packed, scales = tensors["packed"], tensors["scales"]
        return ops.w4_linear(x, packed, scales, tensors.get("zeros"), bias, group)

    def fill_at_random(self, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
        for name, each in tensors.items():
            if name == "packed":
                each.view(torch.uint8).random_(0, 256, generator=generator)
            else:
                each.fill_(8 if name == "zeros" else 0.02 / SPREAD)
