"""In C++: see ``few_tokens.cpp``. Eight-bit caches and many tokens are torch's."""

from __future__ import annotations

from torch import Tensor

from reprise.ops.cpp import FLOAT, INT, KINDS, LONG, POINTER, address, function
from reprise.ops.rotary_cache import host

MOST_TOKENS = 16

_few_tokens = function(
    "rotary_cache/few_tokens.cpp",
    (INT, *[LONG] * 7, POINTER, LONG, *[POINTER] * 7, INT, FLOAT, POINTER),
    INT,
)


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
    if (
        tokens > MOST_TOKENS
        or dtype not in KINDS
        or key_cache.dtype != dtype
        or not (key_cache.is_contiguous() and value_cache.is_contiguous())
        or qkv.stride(1) != 1
    ):
        return host.rotary_cache(
            qkv, positions, cos_sin, slot_mapping, key_cache, value_cache, query_norm, key_norm,
            eps, key_scales, value_scales, fixed_scales,
        )  # fmt: skip
    blocks, block_size, kv_heads, size = key_cache.shape
    queries = qkv.shape[1] // size - 2 * kv_heads
    out = qkv.new_empty(tokens, queries, size)
    gain = key_norm if query_norm is None else query_norm
    wrong = _few_tokens(
        KINDS[dtype], tokens, queries, kv_heads, size, cos_sin.shape[1], cos_sin.shape[0],
        blocks * block_size, qkv.data_ptr(), qkv.stride(0), positions.data_ptr(),
        cos_sin.data_ptr(), slot_mapping.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(),
        address(query_norm), address(key_norm), 0 if gain is None else KINDS[gain.dtype], eps,
        out.data_ptr(),
    )  # fmt: skip
    if wrong:
        what = "position is beyond the rotary table" if wrong == 1 else "slot is beyond the cache"
        raise IndexError(f"rotary_cache: a {what}")
    return out
