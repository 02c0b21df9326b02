import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options, next_power_of_2

_PART = 4096
"""Elements of a row that one program takes."""


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
def part_maxima_kernel(
    logits_ptr, keys_ptr, stride, size, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """keys: [R, parts], the largest of a part: the value in the upper half, so that integers
    compare like the values, and its index in the lower half, counted down."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    index = part * BLOCK + tl.arange(0, BLOCK)
    depend(EARLY)
    value = tl.load(logits_ptr + row * stride + index, mask=index < size, other=-float("inf"))
    value = tl.where(value == 0, 0.0, value.to(tl.float32))  # there are two zeros
    bits = value.to(tl.int32, bitcast=True)
    # Negative numbers have the order of their magnitude; turn it round.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    # Behind the row there is nothing, not even minus infinity.
    key = tl.where(index < size, (ordered << 32) + (0x7FFFFFFF - index), -(1 << 63))
    tl.store(keys_ptr + row * parts + part, tl.max(key, axis=0))


@triton.jit
def argmax_kernel(keys_ptr, out_ptr, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One program takes the largest key of a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    depend(EARLY)
    key = tl.load(keys_ptr + row * parts + part, mask=part < parts, other=-(1 << 63))
    tl.store(out_ptr + row, 0x7FFFFFFF - (tl.max(key, axis=0) & 0x7FFFFFFF))
