import torch
from torch import Tensor

from reprise.ops.fp8_rows import quantise
from reprise.ops.rms_norm.reference import reference as rms_norm


def reference(
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
    """Split QKV, normalise heads (optional), rotate Q and K, and write K and V to the cache.

    Rotary embedding as in RoFormer (Su et al. 2021, eq. 34), in the half-split layout of Hugging
    Face checkpoints, computed in float32. Only the first ``cos_sin.shape[1]`` channels of a head
    rotate.

    Args:
        qkv: [T, (Hq + 2*Hkv) * D], the projection's output: all Q heads, then K, then V; rows may
            be strided.
        positions: [T] int64, position of each token in its request.
        cos_sin: [P, R] float32, row p holds cos(p*f) in its first half and sin(p*f) in its second.
        slot_mapping: [T] int64, block * block_size + offset; padding rows point into block 0.
        key_cache: [N, B, Hkv, D], written at the tokens' slots.
        value_cache: [N, B, Hkv, D], written at the tokens' slots.
        query_norm: [D], RMS-norm gain of the query heads as ``rms_norm`` takes it, or None.
        key_norm: [D], of the key heads, or None.
        eps: For the norms.
        key_scales: [N, Hkv, B] float32, written with the rows where these are eight-bit codes
            (:mod:`reprise.ops.fp8_rows`): what each head's codes are to be multiplied by. None: the
            rows are plain numbers.
        value_scales: The same of ``value_cache``.
        fixed_scales: [2] float32, the scale of all keys and that of all values; 0: each row has
            its own.

    Returns:
        [T, Hq, D], the rotated queries, contiguous.
    """
    tokens = qkv.shape[0]
    _, _, kv_heads, head_size = key_cache.shape
    heads = qkv.view(tokens, qkv.shape[1] // head_size, head_size)
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if query_norm is not None:
        query = rms_norm(query, query_norm, eps)
    if key_norm is not None:
        key = rms_norm(key, key_norm, eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    key = _rotate(key, cos, sin)
    fixed = (None, None) if fixed_scales is None else fixed_scales.unbind()
    write(key_cache, key_scales, slot_mapping, key, fixed[0])
    write(value_cache, value_scales, slot_mapping, value, fixed[1])
    return _rotate(query, cos, sin)


def write(
    cache: Tensor, scales: Tensor | None, slots: Tensor, rows: Tensor, fixed: Tensor | None
) -> None:
    """Put ``rows`` [T, Hkv, D] into their slots; arguments otherwise as of the op."""
    block, offset = slots // cache.shape[1], slots % cache.shape[1]
    if scales is None:
        cache[block, offset] = rows.to(cache.dtype)
        return
    codes, found = quantise(rows, cache.dtype, fixed)
    # Codes are moved as bytes: not every device indexes eight-bit floating-point numbers.
    cache.view(torch.uint8)[block, offset] = codes.view(torch.uint8)
    scales.transpose(1, 2)[block, offset] = found


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = 2 * cos.shape[-1]
    first, second = x[..., :rotary].float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., rotary:]), dim=-1)


def fake(
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
    kv_heads, head_size = key_cache.shape[2:]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // head_size - 2 * kv_heads, head_size))
