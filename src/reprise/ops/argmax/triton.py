import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options, next_power_of_2

_PART = 4096
"""Elements of a row that one program takes."""
NOTHING = tl.constexpr(-(1 << 63))
"""Key of what lies behind a row, where there is nothing, not even minus infinity."""


def argmax(logits: Tensor) -> Tensor:
    """logits: [R, V], rows may be strided."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, size = logits.shape
    parts = cdiv(size, _PART)
    keys = logits.new_empty((rows, parts), dtype=torch.int64)
    out = logits.new_empty((rows,), dtype=torch.int64)
    options = launch_options()
    launch(part_maxima_kernel, (parts, rows))(
        logits, keys, logits.stride(0), size, parts, BLOCK=_PART, num_warps=4, **options
    )
    launch(argmax_kernel, (rows,))(
        keys, out, parts, BLOCK=next_power_of_2(parts), num_warps=1, **options
    )
    return out


@triton.jit
def in_order(value):
    """int32, which compare as the values do; what is no number is the largest, whatever its
    sign."""
    value = tl.where(value == 0, 0.0, value.to(tl.float32))  # there are two zeros
    bits = value.to(tl.int32, bitcast=True)
    # Negative numbers have the order of their magnitude; turn it round.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value == value, ordered, 0x7FFFFFFF)


@triton.jit
def with_index(ordered, index):
    """int64 keys, of which the largest has the largest of :func:`in_order`'s numbers in its upper
    half, and of equal ones the first's index in its lower half, counted down."""
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - index)


@triton.jit
def part_maxima_kernel(
    logits_ptr, keys_ptr, stride, size, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """keys: [R, parts], the largest of each part."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    index = part * BLOCK + tl.arange(0, BLOCK)
    depend(EARLY)
    value = tl.load(logits_ptr + row * stride + index, mask=index < size, other=-float("inf"))
    key = tl.where(index < size, with_index(in_order(value), index), NOTHING)
    tl.store(keys_ptr + row * parts + part, tl.max(key, axis=0))


@triton.jit
def argmax_kernel(keys_ptr, out_ptr, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One program takes the largest key of a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    depend(EARLY)
    key = tl.load(keys_ptr + row * parts + part, mask=part < parts, other=NOTHING)
    tl.store(out_ptr + row, 0x7FFFFFFF - (tl.max(key, axis=0) & 0x7FFFFFFF))
