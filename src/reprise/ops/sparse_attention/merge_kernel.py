# mypy: allow-untyped-defs, no-check-untyped-defs
"""The kernel that merges what the programs of a token found."""

import triton
import triton.language as tl

from reprise.ops.triton_util import depend


@triton.jit(do_not_specialize=["tokens"])
def sparse_merge_kernel(
    found_ptr,
    sums_ptr,
    sinks_ptr,
    out_ptr,
    tokens,
    out_stride,
    out_head_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program merges BLOCK channels, all of one slice, of the parts of a head of a token, STEP
    at a time, in their order."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(2) * BLOCK // SLICE
    real_channel = channel < SIZE
    largest = tl.load(sinks_ptr + head) * 1.4426950408889634
    total = largest * 0 + 1.0
    some = total < 0.0  # padding has no rows
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    depend(EARLY)
    for start in range(0, PARTS, STEP):
        part = start + tl.arange(0, STEP)
        here = (part.to(tl.int64) * tokens + token) * HEADS + head
        place = sums_ptr + here * SLICES + which
        log_sum = tl.load(place, mask=part < PARTS, other=-float("inf"))
        real = log_sum > -float("inf")
        found = tl.load(
            found_ptr + here[:, None] * SIZE + channel[None, :],
            mask=real[:, None] & real_channel[None, :],
            other=0.0,
        )
        high = tl.maximum(largest, tl.max(log_sum, axis=0))
        weights = tl.exp2(log_sum - high)
        decay = tl.exp2(largest - high)
        acc = acc * decay + tl.sum(found * weights[:, None], axis=0)
        total = total * decay + tl.sum(weights, axis=0)
        some = some | (tl.max(log_sum, axis=0) > -float("inf"))
        largest = high
    target = out_ptr + token * out_stride + head * out_head_stride + channel
    acc = tl.where(some, acc / total, 0.0)
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=real_channel)
