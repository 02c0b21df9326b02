import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import warps

_TILE = 1024
"""Elements of a program: it takes several heads of one token."""


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
    block = triton.next_power_of_2(head_size)
    heads_per_program = max(1, _TILE // block)
    _kernel[(tokens, triton.cdiv(heads, heads_per_program))](
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
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(0),
        value_cache.stride(1),
        value_cache.stride(2),
        eps,
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        HEAD_SIZE=head_size,
        HALF=cos_sin.shape[1] // 2,
        BLOCK_SIZE=block_size,
        BLOCK=block,
        HEADS=heads_per_program,
        num_warps=warps(block * heads_per_program),
    )
    return out


@triton.jit
def _kernel(
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
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program takes HEADS of the Q, K and V heads of a token: [HEADS, BLOCK]."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (head < QUERY_HEADS + 2 * KV_HEADS) & (channel < HEAD_SIZE)
    is_query = head < QUERY_HEADS
    is_key = (head >= QUERY_HEADS) & (head < QUERY_HEADS + KV_HEADS)
    # A channel and its partner, the one that it is rotated with, are both read from memory: the
    # second read comes from the first-level cache and no data moves between threads.
    rotates = channel < 2 * HALF
    is_first = channel < HALF
    partner = tl.where(rotates, tl.where(is_first, channel + HALF, channel - HALF), channel)
    source = qkv_ptr + token * qkv_stride + head * HEAD_SIZE
    raw = tl.load(source + channel, mask=inside, other=0.0)
    x = raw.to(tl.float32)
    other = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)

    if query_norm_ptr is not None or key_norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_SIZE + eps)[:, None]
        normalised = (x * scale).to(qkv_ptr.dtype.element_ty).to(tl.float32)
        normalised_other = (other * scale).to(qkv_ptr.dtype.element_ty).to(tl.float32)
        if query_norm_ptr is not None:
            use = inside & is_query
            gain = tl.load(query_norm_ptr + channel, mask=use, other=0.0).to(tl.float32)
            gain_other = tl.load(query_norm_ptr + partner, mask=use, other=0.0).to(tl.float32)
            x = tl.where(is_query, normalised * gain, x)
            other = tl.where(is_query, normalised_other * gain_other, other)
        if key_norm_ptr is not None:
            use = inside & is_key
            gain = tl.load(key_norm_ptr + channel, mask=use, other=0.0).to(tl.float32)
            gain_other = tl.load(key_norm_ptr + partner, mask=use, other=0.0).to(tl.float32)
            x = tl.where(is_key, normalised * gain, x)
            other = tl.where(is_key, normalised_other * gain_other, other)
        x = x.to(qkv_ptr.dtype.element_ty).to(tl.float32)
        other = other.to(qkv_ptr.dtype.element_ty).to(tl.float32)

    position = tl.load(positions_ptr + token)
    angle = cos_sin_ptr + position * cos_sin_stride + tl.where(is_first, channel, partner)
    cos = tl.load(angle, mask=rotates, other=1.0)
    sin = tl.load(angle + HALF, mask=rotates, other=0.0)
    rotated = x * cos + tl.where(is_first, -other, other) * sin
    rotated = tl.where(rotates, rotated, x).to(qkv_ptr.dtype.element_ty)

    query_target = out_ptr + (token * QUERY_HEADS + head) * HEAD_SIZE + channel
    tl.store(query_target, rotated, mask=inside & is_query)
    slot = tl.load(slot_mapping_ptr + token)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    key_head = (head - QUERY_HEADS) * key_head_stride
    key_target = key_cache_ptr + block * key_block_stride + offset * key_slot_stride + key_head
    value_head = (head - QUERY_HEADS - KV_HEADS) * value_head_stride
    value_target = (
        value_cache_ptr + block * value_block_stride + offset * value_slot_stride + value_head
    )
    cache_type = key_cache_ptr.dtype.element_ty
    tl.store(key_target + channel, rotated.to(cache_type), mask=inside & is_key)
    is_value = head >= QUERY_HEADS + KV_HEADS
    tl.store(value_target + channel, raw.to(cache_type), mask=inside & is_value)
