import functools

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import (
    cdiv,
    depend,
    launch,
    launch_options,
    next_power_of_2,
    warps,
    with_gain,
)

_TILE = 4096
"""Elements of a program: it takes several heads of one token, which share its angles."""


def rotary_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Shapes as in the reference; the caches may be strided views with adjoining channels."""
    tokens = qkv.shape[0]
    _, block_size, kv_heads, head_size = key_cache.shape
    heads = qkv.shape[1] // head_size
    query_heads = heads - 2 * kv_heads
    out = qkv.new_empty((tokens, query_heads, head_size))
    options = _options(query_heads, kv_heads, head_size, cos_sin.shape[1] // 2, block_size)
    launch(rotary_cache_kernel, (tokens, cdiv(heads, options["HEADS"])))(
        qkv,
        positions,
        cos_sin,
        slot_mapping,
        key_cache,
        value_cache,
        query_norm,
        key_norm,
        out,
        qkv.stride(0),
        cos_sin.stride(0),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        eps,
        **options,
        **launch_options(),
    )
    return out


@functools.cache
def _options(
    query_heads: int, kv_heads: int, head_size: int, half: int, block_size: int
) -> dict[str, int]:
    heads = max(1, _TILE // next_power_of_2(head_size))
    heads = min(heads, next_power_of_2(query_heads + 2 * kv_heads))
    return {
        "QUERY_HEADS": query_heads,
        "KV_HEADS": kv_heads,
        "HEAD_SIZE": head_size,
        "HALF": half,
        "BLOCK_SIZE": block_size,
        "BLOCK_HALF": next_power_of_2(half),
        "BLOCK_REST": next_power_of_2(max(1, head_size - 2 * half)),
        "HEADS": heads,
        "num_warps": warps(next_power_of_2(head_size) * heads, per_thread=32),
    }


@triton.jit
def _squares(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def _normalise(x, scale, query_norm_ptr, key_norm_ptr, is_query, is_key, channel, real):
    """x: [HEADS, channels], raw; multiplied by scale and gain where its head has a norm."""
    y = x.to(tl.float32)
    # Rounded where the reference rounds.
    if query_norm_ptr is not None:
        gain = tl.load(query_norm_ptr + channel, mask=real, other=0.0)
        normalised = with_gain(x.to(tl.float32) * scale, gain, x.dtype)
        y = tl.where(is_query, normalised.to(x.dtype).to(tl.float32), y)
    if key_norm_ptr is not None:
        gain = tl.load(key_norm_ptr + channel, mask=real, other=0.0)
        normalised = with_gain(x.to(tl.float32) * scale, gain, x.dtype)
        y = tl.where(is_key, normalised.to(x.dtype).to(tl.float32), y)
    return y


@triton.jit
def _store(
    rotated,
    raw,
    out_ptr,
    key_ptr,
    value_ptr,
    channel,
    real,
    is_query,
    is_key,
    is_value,
):
    """Queries and keys rotated, values as they came. The pointers are those of the heads."""
    tl.store(out_ptr + channel, rotated.to(out_ptr.dtype.element_ty), mask=is_query & real)
    tl.store(key_ptr + channel, rotated.to(key_ptr.dtype.element_ty), mask=is_key & real)
    tl.store(value_ptr + channel, raw.to(value_ptr.dtype.element_ty), mask=is_value & real)


@triton.jit
def rotary_cache_kernel(
    qkv_ptr,
    positions_ptr,
    cos_sin_ptr,
    slot_mapping_ptr,
    key_cache_ptr,
    value_cache_ptr,
    query_norm_ptr,
    key_norm_ptr,
    out_ptr,
    qkv_stride,
    cos_sin_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes HEADS of the Q, K and V heads of a token.

    A head is read in three parts: the two halves that are rotated with each other, so that a
    channel and its partner sit in the same thread, and the channels that are not rotated.
    """
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    is_query = head < QUERY_HEADS
    is_key = (head >= QUERY_HEADS) & (head < QUERY_HEADS + KV_HEADS)
    is_value = (head >= QUERY_HEADS + KV_HEADS) & (head < QUERY_HEADS + 2 * KV_HEADS)
    real_head = head < QUERY_HEADS + 2 * KV_HEADS

    channel = tl.arange(0, BLOCK_HALF)[None, :]
    real = channel < HALF
    source = qkv_ptr + token * qkv_stride + head * HEAD_SIZE
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * cos_sin_stride + channel
    cos = tl.load(angle_ptr, mask=real, other=0.0)
    sin = tl.load(angle_ptr + HALF, mask=real, other=0.0)
    slot = tl.load(slot_mapping_ptr + token)
    depend(EARLY)
    first = tl.load(source + channel, mask=real_head & real, other=0.0)
    second = tl.load(source + HALF + channel, mask=real_head & real, other=0.0)
    squares = _squares(first) + _squares(second)
    rest_channel = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    real_rest = rest_channel < HEAD_SIZE
    if HEAD_SIZE > 2 * HALF:
        rest = tl.load(source + rest_channel, mask=real_head & real_rest, other=0.0)
        squares += _squares(rest)
    scale = tl.rsqrt(squares / HEAD_SIZE + eps)[:, None]

    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    query_target = out_ptr + (token * QUERY_HEADS + head) * HEAD_SIZE
    key_target = key_cache_ptr + block * key_block_stride + offset * key_slot_stride
    key_target += (head - QUERY_HEADS) * key_head_stride
    value_target = value_cache_ptr + block * value_block_stride + offset * value_slot_stride
    value_target += (head - QUERY_HEADS - KV_HEADS) * value_head_stride

    x = _normalise(first, scale, query_norm_ptr, key_norm_ptr, is_query, is_key, channel, real)
    y = _normalise(
        second, scale, query_norm_ptr, key_norm_ptr, is_query, is_key, HALF + channel, real
    )
    _store(
        x * cos - y * sin, first, query_target, key_target, value_target,
        channel, real, is_query, is_key, is_value,
    )  # fmt: skip
    _store(
        y * cos + x * sin, second, query_target, key_target, value_target,
        HALF + channel, real, is_query, is_key, is_value,
    )  # fmt: skip
    if HEAD_SIZE > 2 * HALF:
        z = _normalise(
            rest, scale, query_norm_ptr, key_norm_ptr, is_query, is_key, rest_channel, real_rest
        )
        _store(
            z, rest, query_target, key_target, value_target,
            rest_channel, real_rest, is_query, is_key, is_value,
        )  # fmt: skip
