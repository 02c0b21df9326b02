"""Rows that are keys and values at once, in a cache of eight bits: as DeepSeek-V4 was trained with.

Most channels of a row are eight-bit codes, some of them side by side with one scale, a power of two
(Rouhani et al. 2023, "Microscaling Data Formats"). The last channels, which a rotation has told
where the row is, stay numbers. A row's scales follow from the row alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 64
"""Channels that share a scale, at most."""
LEAST = 1e-4
"""Of the largest magnitude among them: scales are no smaller than it asks for."""


def group_size(channels: int) -> int:
    """Channels that share a scale, of so many: as many for each scale."""
    return math.gcd(GROUP, channels)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales: ``x`` is nearly ``codes * scales``.

    The scale is the smallest power of two with which no code is beyond the largest one; it is found
    by whole numbers, so every device finds the same one.

    Args:
        x: [..., D], channels that share a scale; computed in float32.
        dtype: Of the codes: an eight-bit floating-point one.

    Returns:
        [..., D] in ``dtype``, and [...] float32. Where a channel is infinite or NaN all are NaN.
    """
    largest = torch.finfo(dtype).max
    wide = x.float()
    most = wide.abs().amax(dim=-1)
    bits = (most.clamp(min=LEAST) * (1 / largest)).view(torch.int32)
    # The exponent, one more unless it is a power of two already.
    exponents = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    scales = (exponents.int() << 23).view(torch.float32)
    scales = torch.where(most.isfinite(), scales, torch.nan)
    codes = wide / scales.unsqueeze(-1)
    return codes.clamp(-largest, largest).to(dtype), scales


def store(
    rows: Tensor,
    block: Tensor,
    offset: Tensor,
    cache: Tensor,
    tail: Tensor | None,
    scales: Tensor | None,
    real: Tensor | None = None,
) -> None:
    """Write rows where they belong.

    Args:
        rows: [T, D], numbers that the cache's dtype, or its tail's, has.
        block: [T] int64.
        offset: [T] int64, of the row within the block.
        cache: [N, B, D]; or codes, [N, B, G, D'], or [N, B, D] with one scale for all.
        tail: [N, B, D''], the last channels; None: there are no others than codes.
        scales: [N, G, B] float32, or [N, B]; None: the cache has no codes.
        real: [T] bool, where something is written; None: everywhere.
    """

    def put(target: Tensor, new: Tensor) -> None:
        if real is not None:
            seen = real.view(-1, *(1 for _ in new.shape[1:]))
            new = torch.where(seen, new, target[block, offset])
        target[block, offset] = new

    if scales is None:
        put(cache, rows.to(cache.dtype))
        return
    if tail is not None:
        size = tail.shape[2]
        put(tail, rows[:, -size:].to(tail.dtype))
        rows = rows[:, :-size]
    codes, found = quantise(rows.unflatten(1, cache.shape[2:]), cache.dtype)
    # By bytes: not every device copies such numbers by index.
    put(cache.view(torch.uint8), codes.view(torch.uint8))
    put(scales.movedim(-1, 1), found)


def load(places: Tensor, cache: Tensor, tail: Tensor | None, scales: Tensor | None) -> Tensor:
    """Rows by their places, [..., D] float32.

    Args:
        places: [...] int64, ``block * B + offset``.
        cache: As of :func:`store`.
        tail: As of :func:`store`.
        scales: As of :func:`store`.
    """
    block, offset = places // cache.shape[1], places % cache.shape[1]
    if scales is None:
        return cache[block, offset].float()
    codes = cache.view(torch.uint8)[block, offset].view(cache.dtype).float()
    rows = (codes * scales.movedim(-1, 1)[block, offset].unsqueeze(-1)).flatten(places.dim())
    return rows if tail is None else torch.cat((rows, tail[block, offset].float()), dim=-1)


def as_codes(
    rows: Tensor, rotated: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A cache of numbers [N, B, D] as one of codes: these, the numbers of its last ``rotated``
    channels (0: all have codes), and the scales."""
    plain = rows.shape[2] - rotated
    shape = [plain // group_size(plain), group_size(plain)] if rotated else [plain]
    codes, scales = quantise(rows[:, :, :plain].unflatten(2, shape), dtype)
    tail = rows[:, :, plain:].contiguous() if rotated else None
    return codes, tail, scales.movedim(1, -1).contiguous()


def takes_codes(cache: Tensor, scales: Tensor | None = None, **_: object) -> str | None:
    """Why a kernel that writes numbers, or codes with scales, cannot write these; None: it can."""
    each = cache.shape[-1]
    if scales is None or each & (each - 1) == 0:
        return None
    return f"a scale is of {each} channels, which is no power of two"
