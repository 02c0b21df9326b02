"""The rotation, then a product of each group, by an implementation of :func:`fp8_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.ops.linear.around import Product
from reprise.ops.rotary_tail.reference import reference as rotary_tail


def rotated_output(product: Product) -> Product:
    """The op, of ``product``."""

    def by_parts(
        x: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        weight: Tensor,
        scale: Tensor,
        groups: int,
        block_n: int,
        block_k: int,
    ) -> Tensor:
        rotated = rotary_tail(x, positions, cos_sin, 0.0, True).view(len(x), groups, -1)
        pairs = zip(weight.chunk(groups), scale.chunk(groups), strict=True)
        parts = [
            product(rotated[:, each], *pair, None, block_n, block_k)
            for each, pair in enumerate(pairs)
        ]
        return torch.cat(parts, dim=1)

    return by_parts
