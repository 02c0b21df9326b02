"""In C++ for steps of few tokens a request, and for small ones: see ``few_tokens.cpp``. Other
steps, and eight-bit caches, are computed by torch's attention."""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.ops.cpp import FLOAT, INT, LONG, POINTER, Kernel, lies_as
from reprise.ops.paged_attention import sdpa
from reprise.ops.put_off import aside, puts_off

_few_tokens = Kernel(
    "paged_attention/few_tokens.cpp",
    [
        ("threads", INT), ("requests", LONG), ("tokens", LONG), ("queries", LONG),
        ("kv_heads", LONG), ("size", LONG), ("block_size", LONG), ("num_blocks", LONG),
        ("max_blocks", LONG), ("query", POINTER), ("keys", POINTER), ("values", POINTER),
        ("block_stride", LONG), ("slot_stride", LONG), ("head_stride", LONG), ("tables", POINTER),
        ("table_stride", LONG), ("seq_lens", POINTER), ("begins", POINTER), ("out", POINTER),
        ("window", LONG), ("scale", FLOAT), ("soft_cap", FLOAT),
    ],
    {
        1: "a request is longer than its block table",
        2: "a block is beyond the cache",
        3: "a request's tokens are beyond the step's",
    },
)  # fmt: skip

SMALL = 1 << 20
"""Numbers of queries, times the tokens that a request may have: in steps of any kind whose product
is no larger, torch's calls for each request take twice to ten times as long."""


@puts_off
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    query_len: int,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    prompt: int = 0,
) -> None:
    """Arguments as in the reference.

    Raises:
        IndexError: A request is longer than its block table, a block is beyond the cache, or a
            request's tokens are beyond the step's.
    """
    dtype = query.dtype
    requests, most = block_tables.shape
    if not (
        (query_len > 0 or query.numel() * most * key_cache.shape[1] <= SMALL)
        and key_cache.dtype == value_cache.dtype == dtype
        and key_cache.shape == value_cache.shape
        and key_cache.stride() == value_cache.stride()
        and key_cache.stride(3) == 1
        and query.shape[1] % key_cache.shape[2] == 0
        and query.shape[2] == key_cache.shape[3]
        and lies_as(query, dtype, *out.shape)
        and lies_as(out, dtype, *query.shape)
        and block_tables.dtype is torch.int32
        and block_tables.stride(1) == 1
        and lies_as(seq_lens, torch.int32, requests)
        and lies_as(query_start_loc, torch.int32, requests + 1)
        and _few_tokens.takes(dtype)
    ):
        aside(
            sdpa.paged_attention, query, key_cache, value_cache, block_tables, seq_lens,
            query_start_loc, out, scale, sliding_window, soft_cap, query_len, key_scales,
            value_scales, prompt,
        )  # fmt: skip
        return
    blocks, block_size, kv_heads, size = key_cache.shape
    tokens, queries, _ = query.shape
    _few_tokens(
        dtype,
        (query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, out),
        torch.get_num_threads(), requests, tokens, queries, kv_heads, size,
        block_size, blocks, most, query.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(),
        *key_cache.stride()[:3], block_tables.data_ptr(), block_tables.stride(0),
        seq_lens.data_ptr(), query_start_loc.data_ptr(), out.data_ptr(), sliding_window, scale,
        soft_cap,
    )  # fmt: skip
