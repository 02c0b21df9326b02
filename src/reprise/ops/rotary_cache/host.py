"""On a host, where a call of torch costs more than its work on a few tokens: queries and keys are
rotated together, and rows are copied to their slots. The numbers are the reference's."""

import torch
from torch import Tensor

from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.rotary_cache.reference import write


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
    """Arguments as in the reference."""
    tokens = qkv.shape[0]
    _, _, kv_heads, size = key_cache.shape
    heads = qkv.view(tokens, qkv.shape[1] // size, size)
    values = heads.shape[1] - kv_heads
    queries = values - kv_heads
    both = heads[:, :values]
    if query_norm is not None or key_norm is not None:
        query, key = both[:, :queries], both[:, queries:]
        query = query if query_norm is None else rms_norm(query, query_norm, eps)
        key = key if key_norm is None else rms_norm(key, key_norm, eps)
        both = torch.cat((query, key), dim=1)
    rotary = cos_sin.shape[1]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = both[..., :rotary].float().chunk(2, dim=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if both.dtype != torch.float32:
        rotated = [each.to(both.dtype) for each in rotated]
    found = torch.cat((*rotated, both[..., rotary:]), dim=-1)
    fixed = (None, None) if fixed_scales is None else fixed_scales.unbind()
    _write(key_cache, key_scales, slot_mapping, found[:, queries:], fixed[0])
    _write(value_cache, value_scales, slot_mapping, heads[:, values:], fixed[1])
    return found[:, :queries].contiguous()


def _write(
    cache: Tensor, scales: Tensor | None, slots: Tensor, rows: Tensor, fixed: Tensor | None
) -> None:
    if scales is None and cache.is_contiguous():
        cache.view(-1, *rows.shape[1:]).index_copy_(0, slots, rows.to(cache.dtype))
    else:
        write(cache, scales, slots, rows, fixed)
