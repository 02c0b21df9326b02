"""In C++: see ``few_tokens.cpp``. Eight-bit caches and large steps are torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.ops.cpp import FLOAT, INT, KINDS, LONG, POINTER, Kernel, address, lies_as
from reprise.ops.put_off import aside, puts_off
from reprise.ops.rotary_cache import host

MOST_NUMBERS = 1 << 18
"""Of queries, keys and values. One thread takes a fifth of the time that torch's calls do, however
many tokens there are; beyond this so many threads of torch's may be faster."""

_few_tokens = Kernel(
    "rotary_cache/few_tokens.cpp",
    [
        ("gain_kind", INT), ("tokens", LONG), ("queries", LONG), ("kv_heads", LONG),
        ("size", LONG), ("rotary", LONG), ("num_positions", LONG), ("num_slots", LONG),
        ("qkv", POINTER), ("qkv_stride", LONG), ("positions", POINTER), ("cos_sin", POINTER),
        ("slots", POINTER), ("keys", POINTER), ("values", POINTER), ("query_norm", POINTER),
        ("key_norm", POINTER), ("out", POINTER), ("eps", FLOAT),
    ],
    {1: "a position is beyond the rotary table", 2: "a slot is beyond the cache"},
)  # fmt: skip


@puts_off
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
    """Arguments as in the reference.

    Raises:
        IndexError: A position is beyond the table, or a slot beyond the cache.
    """
    tokens, dtype = qkv.shape[0], qkv.dtype
    blocks, block_size, kv_heads, size = key_cache.shape
    gain = key_norm if query_norm is None else query_norm
    kind = torch.float32 if gain is None else gain.dtype
    if not (
        qkv.numel() <= MOST_NUMBERS
        and kind in KINDS
        and qkv.stride(1) == 1
        and qkv.shape[1] % size == 0
        and lies_as(key_cache, dtype, *value_cache.shape)
        and lies_as(value_cache, dtype, *key_cache.shape)
        and lies_as(positions, torch.int64, tokens)
        and lies_as(slot_mapping, torch.int64, tokens)
        and lies_as(cos_sin, torch.float32, *cos_sin.shape)
        and cos_sin.shape[1] % 2 == 0
        and cos_sin.shape[1] <= size
        and lies_as(query_norm, kind, size)
        and lies_as(key_norm, kind, size)
        and _few_tokens.takes(dtype)
    ):
        return aside(
            host.rotary_cache, qkv, positions, cos_sin, slot_mapping, key_cache, value_cache,
            query_norm, key_norm, eps, key_scales, value_scales, fixed_scales,
        )  # fmt: skip
    queries = qkv.shape[1] // size - 2 * kv_heads
    out = qkv.new_empty(tokens, queries, size)
    _few_tokens(
        dtype,
        (qkv, positions, cos_sin, slot_mapping, key_cache, value_cache, query_norm, key_norm, out),
        KINDS[kind], tokens, queries, kv_heads, size,
        cos_sin.shape[1], cos_sin.shape[0], blocks * block_size, qkv.data_ptr(), qkv.stride(0),
        positions.data_ptr(), cos_sin.data_ptr(), slot_mapping.data_ptr(), key_cache.data_ptr(),
        value_cache.data_ptr(), address(query_norm), address(key_norm), out.data_ptr(), eps,
    )  # fmt: skip
    return out
