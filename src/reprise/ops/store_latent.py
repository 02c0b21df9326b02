# mypy: allow-untyped-defs, no-check-untyped-defs
"""Rows of :mod:`reprise.ops.latent_rows` written by kernels: numbers, or codes with scales."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import INTERPRETED, to_float8


def row_options(cache: Tensor, tail: Tensor | None, scales: Tensor | None) -> dict[str, Any]:
    """What :func:`store_row` takes of a cache beside its address and strides of blocks and rows."""
    if scales is None:
        return {"EACH": 0, "TAIL": 0, "ROUND": INTERPRETED}
    return {
        "EACH": cache.shape[-1], "TAIL": 0 if tail is None else tail.shape[2], "ROUND": INTERPRETED,
    }  # fmt: skip


def row_strides(cache: Tensor, tail: Tensor | None, scales: Tensor | None) -> tuple[int, ...]:
    """Of block and row of the cache, of its groups and channels, of the tail, and of block, group
    and row of the scales."""
    groups = cache.stride(2) if cache.dim() == 4 else 0
    tails = (0, 0, 0) if tail is None else tail.stride()
    of_scales = (0, 0, 0)
    if scales is not None:
        block, *group, slot = scales.stride()
        of_scales = (block, *(group or (0,)), slot)
    return *cache.stride()[:2], groups, cache.stride(-1), *tails, *of_scales


@triton.jit
def store_row(
    y, block, offset, cache_ptr, tail_ptr, scales_ptr,
    block_stride, slot_stride, group_stride, channel_stride,
    tail_block_stride, tail_slot_stride, tail_channel_stride,
    scale_block_stride, scale_group_stride, scale_slot_stride,
    SIZE: tl.constexpr, EACH: tl.constexpr, TAIL: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """y: [1, BLOCK] float32, rounded to the compute dtype. EACH: channels of a scale; 0: the cache
    has numbers. TAIL: channels that are numbers nevertheless, the last ones of SIZE."""
    BLOCK: tl.constexpr = y.shape[1]
    kind: tl.constexpr = cache_ptr.dtype.element_ty
    channel = tl.arange(0, BLOCK)[None, :]
    target = cache_ptr + block * block_stride + offset * slot_stride
    if EACH == 0:
        tl.store(target + channel * channel_stride, y.to(kind), mask=channel < SIZE)
    else:
        PLAIN: tl.constexpr = SIZE - TAIL
        if TAIL > 0:
            place = tail_ptr + block * tail_block_stride + offset * tail_slot_stride
            tl.store(
                place + (channel - PLAIN) * tail_channel_stride,
                y.to(tail_ptr.dtype.element_ty),
                mask=(channel >= PLAIN) & (channel < SIZE),
            )
        PARTS: tl.constexpr = BLOCK // EACH
        part = tl.arange(0, PARTS)
        real = part < PLAIN // EACH
        x = tl.reshape(y, [PARTS, EACH])
        finite = tl.sum((tl.abs(x) < float("inf")).to(tl.int32), axis=1) == EACH
        largest: tl.constexpr = 448.0 if kind == tl.float8e4nv else 240.0
        most = tl.where(finite, tl.max(tl.abs(x), axis=1), 1.0)
        bits = (tl.maximum(most, 1e-4) * (1.0 / largest)).to(tl.int32, bitcast=True)
        # The exponent, one more unless it is a power of two already.
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        codes = tl.clamp(tl.where(finite[:, None], x, 0.0) / scale[:, None], -largest, largest)
        inside = tl.broadcast_to(real[:, None], [PARTS, EACH])
        where = part[:, None] * group_stride + tl.arange(0, EACH)[None, :] * channel_stride
        tl.store(target + where, to_float8(codes, kind, ROUND), mask=inside)
        # Where one of them is no number, none is, by the scale.
        scale = tl.where(finite, scale, float("nan"))
        place = scales_ptr + block * scale_block_stride + offset * scale_slot_stride
        tl.store(place + part * scale_group_stride, scale, mask=real)
