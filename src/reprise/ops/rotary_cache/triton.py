import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.fp8_rows import LEAST_SCALE, STORED_LARGEST
from reprise.ops.triton_util import (
    INTERPRETED,
    cdiv,
    depend,
    launch,
    launch_options,
    next_power_of_2,
    to_float8,
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
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    fixed_scales: Tensor | None = None,
) -> Tensor:
    """Shapes as in the reference; the caches may be strided views with adjoining channels."""
    tokens = qkv.shape[0]
    _, block_size, kv_heads, head_size = key_cache.shape
    heads = qkv.shape[1] // head_size
    query_heads = heads - 2 * kv_heads
    out = qkv.new_empty((tokens, query_heads, head_size))
    options = _options(query_heads, kv_heads, head_size, cos_sin.shape[1] // 2, block_size)
    codes = key_cache.dtype if key_scales is not None else None
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
        key_scales,
        value_scales,
        fixed_scales,
        qkv.stride(0),
        cos_sin.stride(0),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        *_scale_strides(key_scales, value_scales),
        eps,
        **options,
        **_options_of_codes(codes),
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


@functools.cache
def _options_of_codes(dtype: torch.dtype | None) -> dict[str, float]:
    """None: the cache has numbers."""
    largest = 0.0 if dtype is None else torch.finfo(dtype).max
    return {
        "LARGEST": largest,
        "STORED": STORED_LARGEST / largest if largest else 0.0,
        "LEAST": LEAST_SCALE,
        "ROUND": INTERPRETED,
    }


def _scale_strides(key_scales: Tensor | None, value_scales: Tensor | None) -> tuple[int, ...]:
    """Of a block, a head and a slot."""
    if key_scales is None or value_scales is None:
        return 0, 0, 0
    if key_scales.stride() != value_scales.stride():
        raise ValueError(
            "key_scales and value_scales must have equal strides, got "
            f"{key_scales.stride()} and {value_scales.stride()}"
        )
    return key_scales.stride()


@triton.jit
def _squares(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def _gain(norm_ptr, channel, real):
    """Of a norm's channels; None if there is no norm."""
    gain = None
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + channel, mask=real, other=0.0)
    return gain


@triton.jit
def _normalise(x, scale, query_gain, key_gain, is_query, is_key):
    """x: [HEADS, channels], raw; multiplied by scale and gain where its head has a norm."""
    y = x.to(tl.float32)
    # Rounded where the reference rounds.
    if query_gain is not None:
        normalised = with_gain(x.to(tl.float32) * scale, query_gain, x.dtype)
        y = tl.where(is_query, normalised.to(x.dtype).to(tl.float32), y)
    if key_gain is not None:
        normalised = with_gain(x.to(tl.float32) * scale, key_gain, x.dtype)
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
def _row(rotated, raw, is_value):
    """What a head's row has: queries and keys rotated, values as they came; in float32, rounded as
    rows of the compute dtype are."""
    return tl.where(is_value, raw, rotated.to(raw.dtype)).to(tl.float32)


@triton.jit
def _largest(row, real):
    return tl.max(tl.where(real, tl.abs(row), 0.0), axis=1)


@triton.jit
def _store_codes(
    row,
    inverse,
    out_ptr,
    key_ptr,
    value_ptr,
    channel,
    real,
    is_query,
    is_key,
    is_value,
    LARGEST: tl.constexpr,
    ROUND: tl.constexpr,
):
    """As :func:`_store`, keys and values times ``inverse`` [HEADS, 1] and of eight bits."""
    tl.store(out_ptr + channel, row.to(out_ptr.dtype.element_ty), mask=is_query & real)
    row = tl.clamp(row * inverse, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    codes = to_float8(row, key_ptr.dtype.element_ty, ROUND)
    tl.store(key_ptr + channel, codes, mask=is_key & real)
    tl.store(value_ptr + channel, codes, mask=is_value & real)


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
    key_scales_ptr,
    value_scales_ptr,
    fixed_scales_ptr,
    qkv_stride,
    cos_sin_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    scale_block_stride,
    scale_head_stride,
    scale_slot_stride,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
    LARGEST: tl.constexpr,
    STORED: tl.constexpr,
    LEAST: tl.constexpr,
    ROUND: tl.constexpr,
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
    rest_channel = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    real_rest = rest_channel < HEAD_SIZE
    query_first = _gain(query_norm_ptr, channel, real)
    query_second = _gain(query_norm_ptr, HALF + channel, real)
    key_first = _gain(key_norm_ptr, channel, real)
    key_second = _gain(key_norm_ptr, HALF + channel, real)
    if HEAD_SIZE > 2 * HALF:
        query_rest = _gain(query_norm_ptr, rest_channel, real_rest)
        key_rest = _gain(key_norm_ptr, rest_channel, real_rest)
    depend(EARLY)
    first = tl.load(source + channel, mask=real_head & real, other=0.0)
    second = tl.load(source + HALF + channel, mask=real_head & real, other=0.0)
    squares = _squares(first) + _squares(second)
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

    x = _normalise(first, scale, query_first, key_first, is_query, is_key)
    y = _normalise(second, scale, query_second, key_second, is_query, is_key)
    if HEAD_SIZE > 2 * HALF:
        z = _normalise(rest, scale, query_rest, key_rest, is_query, is_key)
    if LARGEST == 0:
        _store(
            x * cos - y * sin, first, query_target, key_target, value_target,
            channel, real, is_query, is_key, is_value,
        )  # fmt: skip
        _store(
            y * cos + x * sin, second, query_target, key_target, value_target,
            HALF + channel, real, is_query, is_key, is_value,
        )  # fmt: skip
        if HEAD_SIZE > 2 * HALF:
            _store(
                z, rest, query_target, key_target, value_target,
                rest_channel, real_rest, is_query, is_key, is_value,
            )  # fmt: skip
    else:
        one = _row(x * cos - y * sin, first, is_value)
        two = _row(y * cos + x * sin, second, is_value)
        largest = tl.maximum(_largest(one, real), _largest(two, real))
        if HEAD_SIZE > 2 * HALF:
            three = _row(z, rest, is_value)
            largest = tl.maximum(largest, _largest(three, real_rest))
        row_scale = tl.maximum(largest * (1 / LARGEST), LEAST)[:, None]
        if fixed_scales_ptr is not None:
            fixed = tl.load(fixed_scales_ptr + is_value.to(tl.int32))
            row_scale = tl.where(fixed > 0, fixed * STORED, row_scale)
        inverse = tl.div_rn(1.0, row_scale)
        place = block * scale_block_stride + offset * scale_slot_stride
        key_place = place + (head - QUERY_HEADS) * scale_head_stride
        tl.store(key_scales_ptr + key_place, row_scale, mask=is_key)
        value_place = place + (head - QUERY_HEADS - KV_HEADS) * scale_head_stride
        tl.store(value_scales_ptr + value_place, row_scale, mask=is_value)
        _store_codes(
            one, inverse, query_target, key_target, value_target,
            channel, real, is_query, is_key, is_value, LARGEST, ROUND,
        )  # fmt: skip
        _store_codes(
            two, inverse, query_target, key_target, value_target,
            HALF + channel, real, is_query, is_key, is_value, LARGEST, ROUND,
        )  # fmt: skip
        if HEAD_SIZE > 2 * HALF:
            _store_codes(
                three, inverse, query_target, key_target, value_target,
                rest_channel, real_rest, is_query, is_key, is_value, LARGEST, ROUND,
            )  # fmt: skip
