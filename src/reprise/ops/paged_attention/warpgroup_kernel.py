# mypy: allow-untyped-defs, no-check-untyped-defs
"""Paged attention of prompts on devices with warpgroup matrix instructions, written in Gluon.

As ``mixed_kernel``: one program takes a tile of a request's new tokens, for one KV head. Here the
scores of a tile of keys are asked for together with the values' product of the tile before, so that
matrix units have work while a softmax is computed; Triton waits for each product where it stands.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from reprise.ops.paged_attention.attend import Call
from reprise.ops.paged_attention.triton import bind as bind_triton
from reprise.ops.paged_attention.triton import splits
from reprise.ops.triton_util import cdiv, launch

_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""The second is what it is called in Triton 3.6."""
_BLOCK_M = 128
_BLOCK_N = 128
_WARPS = 8


def paged_attention(*args: Any, **kwargs: Any) -> None:
    """Arguments as in the reference."""
    bind(*args, **kwargs)


def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    call = Call(*args, **kwargs)
    return launch_warpgroups(call) if takes(call) else bind_triton(*args, **kwargs)


def takes(call: Call) -> bool:
    """Whether this kernel computes such a call."""
    caches = call.key_cache, call.value_cache
    return (
        not splits(call)
        and call.query.dtype in (torch.bfloat16, torch.float16)
        and call.query.shape[2] in (64, 128)
        and call.group <= _BLOCK_M
        and call.sliding_window == 0
        and call.soft_cap == 0
        and call.key_scales is None
        and _BLOCK_N % call.key_cache.shape[1] == 0
        # Copies are of 16 bytes.
        and all(each.data_ptr() % 16 == 0 for each in caches)
        and all(stride % 8 == 0 for stride in call.key_cache.stride()[:-1])
    )


def launch_warpgroups(call: Call) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    tokens, _, head_size = call.query.shape
    _, block_size, kv_heads, _ = call.key_cache.shape
    requests, group = call.block_tables.shape[0], call.group
    block_q = _BLOCK_M // group
    # Request r's tiles start at query_start_loc[r] // block_q + r, which leaves each enough.
    grid = ((cdiv(tokens, block_q) + requests) * kv_heads,)
    tensors: tuple[Tensor, ...] = call[:7]
    strides = call.strides_and_numbers()
    args = (*tensors, tokens, requests, *strides[:5], *strides[7:11])
    options = {
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_Q": block_q,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_D": head_size,
        "WARPS": _WARPS,
        "num_warps": _WARPS,
    }
    return functools.partial(launch(warpgroup_attention_kernel, grid)(*args, **options), *args)


@gluon.jit
def _copy_tile(
    keys,
    values,
    key_ptr,
    value_ptr,
    block,
    start,
    end,
    block_stride,
    slot_stride,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    COPY: gl.constexpr,
):
    """Start to copy keys and values ``start`` up to ``end``, and zeros behind, which a weight of
    zero may be multiplied with: a stale slot may hold NaN."""
    key = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COPY))
    there = (start >= 0) & (key < end - start)
    # A cache may have more than 2**31 elements.
    slot = block.to(gl.int64) * block_stride + (key % BLOCK_SIZE) * slot_stride
    channel = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, COPY))
    offset = slot[:, None] + channel[None, :]
    _copy(keys, key_ptr + offset, mask=there[:, None])
    _copy(values, value_ptr + offset, mask=there[:, None])
    async_copy.commit_group()


@gluon.jit
def _blocks(
    table_ptr, start, end, BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, COPY: gl.constexpr
):
    key = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COPY))
    there = (start >= 0) & (key < end - start)
    return gl.load(table_ptr + start // BLOCK_SIZE + key // BLOCK_SIZE, mask=there, other=0)


@gluon.jit
def _softmax(
    scores,
    row_max,
    row_sum,
    start,
    end,
    position,
    factor,
    MASKED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SCORES: gl.constexpr,
):
    """Weights of a tile's keys, the new base-2 maximum and sum, and what sums so far count."""
    if MASKED:
        key = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        visible = (key < end)[None, :] & (key[None, :] <= position[:, None])
        scores = gl.where(visible, scores, -float("inf"))
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * factor)
    if MASKED:
        # A row that has seen no key yet has the maximum -inf, and -inf + inf is NaN.
        shift = gl.where(new_max == -float("inf"), 0.0, new_max)
    else:
        shift = new_max
    weights = gl.exp2(scores * factor - shift[:, None])
    decay = gl.exp2(row_max - shift)
    return weights, new_max, row_sum * decay + gl.sum(weights, axis=1), decay


@gluon.jit
def _after(row_sum):
    """``row_sum``, and no wait behind this call moves to before it: a sum is never negative, but a
    compiler cannot know that."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; setp.lt.f32 p, $1, 0f00000000; mov.b32 a, 0; "
        "@p st.volatile.shared.b32 [a], $1; mov.b32 $0, $1; }", "=r,r",
        [row_sum], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _step(
    index,
    tiles,
    query,
    keys,
    values,
    acc,
    found,
    row_max,
    row_sum,
    block,
    key_ptr,
    value_ptr,
    table_ptr,
    end,
    position,
    factor,
    block_stride,
    slot_stride,
    MASKED: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    COPY: gl.constexpr,
    SCORES: gl.constexpr,
    OUT: gl.constexpr,
):
    """Scores of tile ``index`` from the end, with the values' product of the one behind it."""
    dtype: gl.constexpr = query.dtype
    async_copy.wait_group(0)
    fence_async_shared()
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(
        query, keys.index(index % 2).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    weights = gl.convert_layout(found.to(dtype), gl.DotOperandLayout(0, OUT, 2))
    acc = warpgroup_mma(weights, values.index((index + 2) % 3), acc, is_async=True)
    start = (tiles - 1 - index) * BLOCK_N
    _copy_tile(
        keys.index((index + 1) % 2), values.index((index + 1) % 3), key_ptr, value_ptr, block,
        start - BLOCK_N, end, block_stride, slot_stride, BLOCK_SIZE, BLOCK_N, BLOCK_D, COPY,
    )  # fmt: skip
    block = _blocks(table_ptr, start - 2 * BLOCK_N, end, BLOCK_SIZE, BLOCK_N, COPY)
    scores = warpgroup_mma_wait(1, deps=[scores])
    found, row_max, row_sum, decay = _softmax(
        scores, row_max, row_sum, start, end, position, factor, MASKED, BLOCK_N, SCORES
    )
    row_sum = _after(row_sum)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OUT))[:, None]
    return acc, found, row_max, row_sum, block


@gluon.jit(do_not_specialize=["tokens", "requests"])
def warpgroup_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    seq_lens_ptr,
    starts_ptr,
    out_ptr,
    tokens,
    requests,
    query_stride,
    query_head_stride,
    block_stride,
    slot_stride,
    head_stride,
    table_stride,
    out_stride,
    out_head_stride,
    scale,
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One program attends for BLOCK_Q new tokens of a request, for one KV head, from its last keys
    to its first."""
    ACROSS: gl.constexpr = BLOCK_D // 8
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_D, 16])
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)

    kv_head = gl.program_id(0) % KV_HEADS
    # The last tiles see the most keys; starting with them leaves no long one for the end.
    tile = gl.num_programs(0) // KV_HEADS - 1 - gl.program_id(0) // KV_HEADS
    covered = gl.load(starts_ptr + requests)
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, COPY))
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, COPY))
    if tile >= covered // BLOCK_Q + requests:
        target = (tile - requests) * BLOCK_Q + token
        behind = (token < BLOCK_Q) & (target >= covered) & (target < tokens)
        offset = target.to(gl.int64) * out_stride + head * out_head_stride
        nothing = gl.zeros([BLOCK_M, BLOCK_D], dtype, COPY)
        gl.store(out_ptr + offset[:, None] + channel[None, :], nothing, mask=behind[:, None])
        return

    # Binary search for the last request whose first tile is not behind this one.
    request = 0
    too_far = requests
    while request + 1 < too_far:
        middle = (request + too_far) // 2
        if gl.load(starts_ptr + middle) // BLOCK_Q + middle <= tile:
            request = middle
        else:
            too_far = middle
    begin = gl.load(starts_ptr + request)
    new = gl.load(starts_ptr + request + 1) - begin
    first_token = (tile - begin // BLOCK_Q - request) * BLOCK_Q
    if first_token >= new:
        return
    length = gl.load(seq_lens_ptr + request)
    first_position = length - new + first_token
    end = gl.minimum(length, first_position + BLOCK_Q)
    tiles = gl.cdiv(end, BLOCK_N)
    key_ptr += kv_head * head_stride
    value_ptr += kv_head * head_stride
    table_ptr += request.to(gl.int64) * table_stride  # type: ignore[attr-defined]

    keys = gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_D], TILE)
    values = gl.allocate_shared_memory(dtype, [3, BLOCK_N, BLOCK_D], TILE)
    start = (tiles - 1) * BLOCK_N
    block = _blocks(table_ptr, start, end, BLOCK_SIZE, BLOCK_N, COPY)
    _copy_tile(
        keys.index(0), values.index(0), key_ptr, value_ptr, block,
        start, end, block_stride, slot_stride, BLOCK_SIZE, BLOCK_N, BLOCK_D, COPY,
    )  # fmt: skip
    token += first_token
    used = (row < BLOCK_Q * GROUP) & (token < new)
    query_row = (begin + token).to(gl.int64)
    query_offset = query_row * query_stride + head * query_head_stride
    rows = gl.load(
        query_ptr + query_offset[:, None] + channel[None, :], mask=used[:, None], other=0.0
    )
    query = gl.allocate_shared_memory(
        dtype,
        [BLOCK_M, BLOCK_D],
        gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype),
        rows,
    )
    block = _blocks(table_ptr, start - BLOCK_N, end, BLOCK_SIZE, BLOCK_N, COPY)

    score_row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SCORES))
    position = first_position + score_row // GROUP
    factor = scale * 1.4426950408889634
    async_copy.wait_group(0)
    fence_async_shared()
    scores = warpgroup_mma(
        query, keys.index(0).permute((1, 0)),
        gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES), use_acc=False, is_async=True,
    )  # fmt: skip
    _copy_tile(
        keys.index(1), values.index(1), key_ptr, value_ptr, block,
        start - BLOCK_N, end, block_stride, slot_stride, BLOCK_SIZE, BLOCK_N, BLOCK_D, COPY,
    )  # fmt: skip
    block = _blocks(table_ptr, start - 2 * BLOCK_N, end, BLOCK_SIZE, BLOCK_N, COPY)
    scores = warpgroup_mma_wait(0, deps=[scores])
    row_max = gl.full([BLOCK_M], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
    row_sum = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, SCORES))
    found, row_max, row_sum, _ = _softmax(
        scores, row_max, row_sum, start, end, position, factor, True, BLOCK_N, SCORES
    )
    acc = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, OUT)
    # Keys that every row sees need no mask.
    clear = gl.maximum(1, tiles - (first_position + 1) // BLOCK_N)
    for index in range(1, clear):
        acc, found, row_max, row_sum, block = _step(
            index, tiles, query, keys, values, acc, found, row_max, row_sum, block,
            key_ptr, value_ptr, table_ptr, end, position, factor, block_stride, slot_stride,
            True, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, COPY, SCORES, OUT,
        )  # fmt: skip
    for index in range(clear, tiles):
        acc, found, row_max, row_sum, block = _step(
            index, tiles, query, keys, values, acc, found, row_max, row_sum, block,
            key_ptr, value_ptr, table_ptr, end, position, factor, block_stride, slot_stride,
            False, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, COPY, SCORES, OUT,
        )  # fmt: skip
    async_copy.wait_group(0)
    fence_async_shared()
    weights = gl.convert_layout(found.to(dtype), gl.DotOperandLayout(0, OUT, 2))
    acc = warpgroup_mma(weights, values.index((tiles + 2) % 3), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    total = gl.convert_layout(gl.where(row_sum == 0, 1.0, row_sum), gl.SliceLayout(1, OUT))
    result = gl.convert_layout((acc / total[:, None]).to(dtype), COPY)
    out_offset = query_row * out_stride + head * out_head_stride
    gl.store(out_ptr + out_offset[:, None] + channel[None, :], result, mask=used[:, None])


paged_attention.bind = bind  # type: ignore[attr-defined]
