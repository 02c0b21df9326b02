import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.apply_bitmask.triton import allowed_by
from reprise.ops.argmax.triton import NOTHING, in_order, with_index
from reprise.ops.triton_util import cdiv, depend, launch, launch_options, next_power_of_2

_PART = 4096
"""Elements of a row that one program takes."""
_LEAST = tl.constexpr(-0x80000000)
"""Less than :func:`in_order` gives for any number."""


def masked_argmax(logits: Tensor, which: Tensor, bits: Tensor, peaks: Tensor) -> Tensor:
    """Arguments as in the reference; rows of ``logits`` and ``bits`` may be strided."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if bits.stride(1) != 1:
        bits = bits.contiguous()
    rows, size = logits.shape
    parts = cdiv(size, _PART)
    keys = logits.new_empty((rows, parts), dtype=torch.int64)
    largest = logits.new_empty((rows, parts), dtype=torch.int32)
    tokens = logits.new_empty((rows,), dtype=torch.int64)
    options = launch_options()
    launch(masked_maxima_kernel, (parts, rows))(
        logits, which, bits, keys, largest, logits.stride(0), bits.stride(0), size, parts,
        BLOCK=_PART, num_warps=4, **options,
    )  # fmt: skip
    launch(masked_argmax_kernel, (rows,))(
        keys, largest, tokens, peaks, parts,
        BLOCK=next_power_of_2(parts), num_warps=1, **options,
    )  # fmt: skip
    return tokens


@triton.jit
def masked_maxima_kernel(
    logits_ptr,
    which_ptr,
    bits_ptr,
    keys_ptr,
    largest_ptr,
    stride,
    bits_stride,
    size,
    parts,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """keys: [R, parts] as of ``argmax``, of tokens that may come; largest: [R, parts], of all."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    word = part * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    index = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = index < size
    depend(EARLY)
    mask = tl.load(which_ptr + row)
    value = tl.load(logits_ptr + row * stride + index, mask=inside, other=-float("inf"))
    ordered = in_order(value)
    tl.store(largest_ptr + row * parts + part, tl.max(tl.max(ordered, axis=1), axis=0))
    allowed = allowed_by(bits_ptr, bits_stride, mask, word, size)
    ordered = tl.where(allowed, ordered, in_order(tl.full(index.shape, -float("inf"), tl.float32)))
    ordered = tl.where(inside, ordered, _LEAST)
    largest = tl.max(tl.max(ordered, axis=1), axis=0)
    first = tl.min(tl.min(tl.where(ordered == largest, index, 0x7FFFFFFF), axis=1), axis=0)
    tl.store(keys_ptr + row * parts + part, with_index(largest, first))


@triton.jit
def masked_argmax_kernel(
    keys_ptr, largest_ptr, tokens_ptr, peaks_ptr, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """One program takes the largest key of a row, and the largest number."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    inside = part < parts
    depend(EARLY)
    key = tl.load(keys_ptr + row * parts + part, mask=inside, other=NOTHING)
    tl.store(tokens_ptr + row, 0x7FFFFFFF - (tl.max(key, axis=0) & 0x7FFFFFFF))
    ordered = tl.max(tl.load(largest_ptr + row * parts + part, mask=inside, other=_LEAST), axis=0)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    peak = bits.to(tl.float32, bitcast=True)
    tl.store(peaks_ptr + row, peak.to(peaks_ptr.dtype.element_ty))
