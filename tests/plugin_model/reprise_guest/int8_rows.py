"""Weights as int8 numbers, with one scale for each output feature."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from reprise.errors import ModelError
from reprise.layers.formats import DENSE, Format, Formats
from reprise_guest.int8_linear import int8_linear


class Int8Rows(Format):
    """``weight`` [out_features, in_features] int8, ``weight_scale`` [out_features, 1] float32."""

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {
            "weight": torch.empty(out_features, in_features, dtype=torch.int8, device=device),
            "weight_scale": torch.empty(out_features, 1, dtype=torch.float32, device=device),
        }

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return int8_linear(x, tensors["weight"], tensors["weight_scale"], bias)

    def fill_at_random(self, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
        tensors["weight"].random_(-127, 128, generator=generator)
        tensors["weight_scale"].fill_(0.02 / 73)


class _Formats:
    def __init__(self, plain: Collection[str]) -> None:
        self._plain = plain

    def of(self, path: str) -> Format:
        plain = path in self._plain or path.rpartition(".")[2] in self._plain
        return DENSE if plain else _INT8_ROWS


_INT8_ROWS = Int8Rows()


def formats(config: Mapping[str, Any]) -> Formats:
    """See :func:`reprise.layers.formats.formats_of`."""
    unknown = config.keys() - {"quant_method", "modules_to_not_convert"}
    if unknown:
        fields = ", ".join(sorted(unknown))
        raise ModelError(f"quantization_config has {fields}, which is not supported")
    return _Formats(config.get("modules_to_not_convert") or ())
