import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, launch

_PART = 1 << 16
"""Words of a unit that one program takes: long units are shared out."""


def checksum(words: Tensor, units: Tensor | None) -> Tensor:
    """words: [R, N, W] int32."""
    regions, count, length = words.shape
    if units is not None:
        count = len(units)
    sums = torch.zeros((regions, count), dtype=torch.int64, device=words.device)
    if sums.numel() == 0 or length == 0:
        return sums
    # Several short units in a program share the factors of their places.
    group = 1 if length > _PART or count == 1 else 8
    block = 4096 // group
    parts = cdiv(length, _PART)
    launch(checksum_kernel, (cdiv(count, group), regions, parts))(
        words, units, sums, words.stride(0), words.stride(1), count, length,
        HAS_UNITS=units is not None, GROUP=group, BLOCK=block, PART=_PART, num_warps=8,
    )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["count"])
def checksum_kernel(
    words_ptr,
    units_ptr,
    sums_ptr,
    region_stride,
    unit_stride,
    count,
    length,
    HAS_UNITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Adds one part of GROUP units to their sums; additions modulo 2**64 have no order."""
    number = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    region = tl.program_id(1).to(tl.int64)
    there = number < count
    if HAS_UNITS:
        unit = tl.load(units_ptr + number, mask=there, other=0)
    else:
        unit = number.to(tl.int64)
    begin = tl.program_id(2).to(tl.int64) * PART
    end = tl.minimum(begin + PART, length)
    rows_ptr = words_ptr + region * region_stride + unit * unit_stride
    total = tl.zeros((GROUP, BLOCK), dtype=tl.int64)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = place < end
        x = place.to(tl.uint32)
        x = x ^ (x >> 16)
        x = x * 0x85EBCA6B
        x = x ^ (x >> 13)
        x = x * 0xC2B2AE35
        x = x ^ (x >> 16)
        factor = (x.to(tl.int64) << 1) | 1
        mask = there[:, None] & inside[None, :]
        word = tl.load(rows_ptr[:, None] + place[None, :], mask=mask, other=0)
        total += word.to(tl.int64) * factor[None, :]
    sum_of_unit = tl.sum(total, axis=1)
    tl.atomic_add(sums_ptr + region * count + number, sum_of_unit, mask=there, sem="relaxed")
