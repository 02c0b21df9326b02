# mypy: allow-untyped-defs, no-check-untyped-defs
"""How what programs found of a request becomes its result, where several share its keys."""

import triton
import triton.language as tl

from reprise.ops.triton_util import is_last


@triton.jit
def pick(values, request, which):
    """The value of one request."""
    return tl.sum(tl.where(request == which, values, 0))


@triton.jit
def finish(
    acc,
    row_sum,
    row_max,
    out_ptr,
    partial_ptr,
    log_sums_ptr,
    arrivals_ptr,
    request,
    begin,
    new,
    token,
    head,
    kv_head,
    program,
    owner,
    sharers,
    out_stride,
    out_head_stride,
    QUERY_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGED: tl.constexpr,
):
    """What a program found of a request, as its result if it has the request to itself; else left
    for the last of its ``sharers`` programs from ``owner`` on, which merges what all have left.

    acc: [BLOCK_M, BLOCK_D]; row_sum, row_max (base 2), token (of the request's new ones), head:
    [BLOCK_M]; begin: the request's first row; new: how many it has.
    """
    channel = tl.arange(0, BLOCK_D)[None, :]
    used = token < new
    used_channel = used[:, None] & (channel < HEAD_SIZE)
    # Rows that saw no key stay zero.
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    if sharers == 1:
        offset = (begin + token).to(tl.int64) * out_stride + head * out_head_stride
        tl.store(
            out_ptr + offset[:, None] + channel, acc.to(out_ptr.dtype.element_ty), mask=used_channel
        )
    else:
        slot = 2 * program + (program == owner).to(tl.int32)
        partial_row = slot.to(tl.int64) * (QUERY_LEN * HEADS) + token * HEADS + head
        tl.store(partial_ptr + partial_row[:, None] * HEAD_SIZE + channel, acc, mask=used_channel)
        tl.store(log_sums_ptr + partial_row, row_max + tl.log2(row_sum), mask=used)
        if is_last(arrivals_ptr + request * KV_HEADS + kv_head, sharers):
            _merge(
                partial_ptr, log_sums_ptr, out_ptr + begin.to(tl.int64) * out_stride,
                owner, sharers, new, kv_head, out_stride, out_head_stride,
                QUERY_LEN, HEADS, HEADS // KV_HEADS, HEAD_SIZE, BLOCK_D, MERGED,
            )  # fmt: skip


@triton.jit
def _merge(
    partial_ptr,
    log_sums_ptr,
    out_ptr,
    owner,
    sharers,
    new,
    kv_head,
    out_stride,
    out_head_stride,
    QUERY_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Write a request's output for one KV head from what its ``sharers`` programs from ``owner``
    on found, MERGED at a time, in their order.

    partial: [2 * programs, QUERY_LEN * HEADS, HEAD_SIZE], for each program that of a request that
    began before it, then that of one that begins with it; log_sums: without the last dimension,
    base 2. They have just been written: the nearest cache may hold older values.
    """
    ROWS: tl.constexpr = 2 if GROUP * QUERY_LEN <= 2 else 4
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]
    for start_row in range(0, new * GROUP, ROWS):
        row = start_row + tl.arange(0, ROWS)
        real_row = row < new * GROUP
        head = kv_head * GROUP + row % GROUP
        acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        largest = tl.full([ROWS], -float("inf"), dtype=tl.float32)
        for start in range(0, sharers, MERGED):
            sharer = start + tl.arange(0, MERGED)
            real = real_row[:, None] & (sharer < sharers)[None, :]
            slot = 2 * (owner + sharer) + (sharer == 0).to(tl.int32)
            source = slot.to(tl.int64)[None, :] * (QUERY_LEN * HEADS)
            source += (row // GROUP * HEADS + head)[:, None]
            log_sum = tl.load(
                log_sums_ptr + source, mask=real, other=-float("inf"), cache_modifier=".cg"
            )
            found = tl.load(
                partial_ptr + source[:, :, None] * HEAD_SIZE + channel[None, None, :],
                mask=real[:, :, None] & real_channel[None, :, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_largest = tl.maximum(largest, tl.max(log_sum, axis=1))
            shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
            weights = tl.exp2(log_sum - shift[:, None])
            decay = tl.exp2(largest - shift)
            acc = acc * decay[:, None] + tl.sum(found * weights[:, :, None], axis=1)
            total = total * decay + tl.sum(weights, axis=1)
            largest = new_largest
        target = (row // GROUP).to(tl.int64) * out_stride + head * out_head_stride
        tl.store(
            out_ptr + target[:, None] + channel[None, :],
            (acc / tl.where(total == 0, 1.0, total)[:, None]).to(out_ptr.dtype.element_ty),
            mask=real_row[:, None] & real_channel,
        )
