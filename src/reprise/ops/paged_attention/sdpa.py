"""Paged attention on the CPU through torch's fused scaled dot product attention.

Keys and values are used where they lie whenever a request's blocks are neighbours in the cache
(the block pool hands out neighbours when it can); only scattered requests are gathered first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.paged_attention.reference import visibility
from reprise.ops.registry import op_memory


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
    block_size = key_cache.shape[1]
    starts, tables = query_start_loc.tolist(), block_tables.tolist()
    caches = ((key_cache, key_scales), (value_cache, value_scales))
    for row, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        if seq_len == 0:
            out[begin:end].zero_()
            continue
        new = end - begin
        _, place = seen_by(tables[row], block_size, seq_len, new, sliding_window)
        keys, values = (tokens_of(*each, place, query.dtype) for each in caches)
        if soft_cap > 0:
            _soft_capped(query[begin:end], keys, values, out[begin:end], scale,
                         sliding_window, soft_cap)  # fmt: skip
        elif new == 1:
            _one_token(query[begin], keys, values, out[begin], scale, sliding_window)
        else:
            _chunk(query[begin:end], keys, values, out[begin:end], scale, sliding_window)
    out[starts[-1] :].zero_()


class Place(NamedTuple):
    """Where a request's tokens lie: those in ``blocks`` from number ``before`` to ``end``."""

    blocks: list[int]
    before: int
    end: int


def seen_by(
    table: list[int], block_size: int, seq_len: int, new: int, window: int
) -> tuple[int, Place]:
    """What the last ``new`` of a request's tokens see: the first token's number, and where all
    are."""
    first = max(0, seq_len - new - window + 1) if window > 0 else 0
    before = first % block_size  # in the first block, before the window
    blocks = table[first // block_size : math.ceil(seq_len / block_size)]
    return first, Place(blocks, before, seq_len - first + before)


def tokens_of(cache: Tensor, scales: Tensor | None, place: Place, dtype: torch.dtype) -> Tensor:
    """As :func:`_tokens`; eight-bit codes as the numbers that they stand for."""
    tokens = _tokens(cache, place)
    if scales is None:
        return tokens
    blocks = torch.tensor(place.blocks, dtype=torch.int64)
    by_token = scales[blocks].transpose(1, 2).flatten(0, 1)[place.before : place.end]
    codes = tokens.reshape(-1).view(torch.uint8).int()
    numbers = _numbers_of(cache.dtype).index_select(0, codes).view(tokens.shape)
    return (numbers * by_token.unsqueeze(-1)).to(dtype)


def _numbers_of(dtype: torch.dtype) -> Tensor:
    """[256] float32: what each code stands for. Looking them up is four times as fast as torch's
    conversion."""
    memory, name = op_memory(), f"numbers of {dtype}"
    if name not in memory:
        memory[name] = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return memory[name]


def _tokens(cache: Tensor, place: Place) -> Tensor:
    """[end - before, Hkv, D], a view where blocks adjoin."""
    blocks, before, end = place
    start = blocks[0]
    if blocks == list(range(start, start + len(blocks))):
        first = start * cache.shape[1]
        return cache.flatten(0, 1)[first + before : first + end]
    return cache[torch.tensor(blocks, dtype=torch.int64)].flatten(0, 1)[before:end]


def _one_token(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float, window: int
) -> None:
    """query, out: [Hq, D]. The query heads of a KV head share its keys as if they were tokens."""
    if window > 0:
        keys, values = keys[-window:], values[-window:]
    kv_heads, head_size = keys.shape[1:]
    grouped = query.view(1, kv_heads, -1, head_size)
    attended = F.scaled_dot_product_attention(
        grouped, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scale=scale
    )
    out.copy_(attended.view(out.shape))


def _chunk(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float, window: int
) -> None:
    """query, out: [new, Hq, D]; keys, values: [total, Hkv, D] with total >= new."""
    new, heads, head_size = query.shape
    total, kv_heads, _ = keys.shape
    group = heads // kv_heads
    causal = total == new and (window == 0 or total <= window)
    mask = None if causal else visibility(new, total, window, query.device)
    grouped = query.view(new, kv_heads, group, head_size).permute(1, 2, 0, 3)
    shared_keys = keys.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    shared_values = values.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    attended = F.scaled_dot_product_attention(
        grouped, shared_keys, shared_values, attn_mask=mask, is_causal=causal, scale=scale
    )
    out.copy_(attended.permute(2, 0, 1, 3).reshape(out.shape))


def _soft_capped(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float, window: int,
    soft_cap: float,
) -> None:  # fmt: skip
    """Shapes as in :func:`_chunk`; SDPA has no soft cap, so the scores are materialised."""
    new, heads, head_size = query.shape
    total, kv_heads, _ = keys.shape
    grouped = query.view(new, kv_heads, heads // kv_heads, head_size).float()
    scores = torch.einsum("qhgd,khd->hgqk", grouped, keys.float()) * scale
    scores = soft_cap * torch.tanh(scores / soft_cap)
    visible = visibility(new, total, window, query.device)
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    out.copy_(torch.einsum("hgqk,khd->qhgd", weights, values.float()).reshape(out.shape))
