"""Rows of eight-bit numbers with a scale for each head: how a KV cache is quantised, in torch.

A row's scale follows from the row alone, so that no later row changes what an earlier one means.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SCALE = 1e-30
"""So that a row of zeros has a scale whose inverse is finite."""
STORED_LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""The code that scales stored with a checkpoint are of, whichever dtype the cache has."""


def quantise(x: Tensor, dtype: torch.dtype, fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales: ``x`` is nearly ``codes * scales``, each element within half a code step.

    Args:
        x: [..., D], the rows; computed in float32.
        dtype: Of the codes: an eight-bit floating-point one.
        fixed: A float32 scalar, or one that broadcasts to [...]: where it is above 0, the scale of
            every row as a checkpoint stores it (for e4m3 with a largest code of 448). What is
            beyond the largest code saturates.

    Returns:
        [..., D] in ``dtype``, and [...] float32. A row with an infinity or NaN is NaN as a whole.
    """
    largest = torch.finfo(dtype).max
    wide = x.float()
    # A product by a constant and one division a row, which every device rounds alike.
    scales = (wide.abs().amax(dim=-1) * (1 / largest)).clamp(min=LEAST_SCALE)
    if fixed is not None:
        scales = torch.where(fixed > 0, fixed * (STORED_LARGEST / largest), scales)
    codes = wide * (1 / scales).unsqueeze(-1)
    return codes.clamp(-largest, largest).to(dtype), scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """[..., D] float32 of codes [..., D] and scales [...]."""
    return codes.float() * scales.unsqueeze(-1)
