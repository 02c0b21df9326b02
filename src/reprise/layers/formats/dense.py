from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reprise import ops
from reprise.layers.formats.base import Format


class Dense(Format):
    """Plain numbers of the compute dtype: ``weight`` [out_features, in_features]."""

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {"weight": torch.empty(out_features, in_features, dtype=dtype, device=device)}

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return ops.linear(x, tensors["weight"], bias)

    def wide(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return ops.wide_linear(x, tensors["weight"])

    def by_groups(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return ops.grouped_output(x, tensors["weight"])

    def gated(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return ops.gated_linear(x, tensors["weight"], bias)

    def norm_linear(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        return ops.norm_linear(x, norm_weight, eps, tensors["weight"], bias)

    def norm_gated(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        return ops.norm_gated_linear(x, norm_weight, eps, tensors["weight"], bias)

    def add(
        self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, residual: Tensor
    ) -> None:
        ops.linear_add(x, tensors["weight"], bias, residual)

    def into(
        self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, out: Tensor
    ) -> None:
        if bias is None:
            ops.linear_into(x, tensors["weight"], out)
        else:
            super().into(x, tensors, bias, out)

    def grouped(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        limit: float = 0.0,
    ) -> Tensor:
        return ops.experts(x, weights, ids, gate_up["weight"], down["weight"], limit)

    def grouped_add(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        residual: Tensor,
    ) -> None:
        ops.experts_add(x, weights, ids, gate_up["weight"], down["weight"], residual)


DENSE = Dense()


class _Plain:
    def of(self, path: str) -> Format:
        return DENSE


PLAIN = _Plain()
"""Of a checkpoint that is not quantised."""
