import math

import torch
from torch import Tensor

from reprise.ops.fp8_rows import dequantise


def reference(
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
    """Causal attention of each request's new tokens over its paged keys and values.

    Request r owns rows ``query_start_loc[r]`` to ``query_start_loc[r+1]`` of ``query``, the last
    of its ``seq_lens[r]`` tokens; their keys and values are in the cache already. A request with
    ``seq_lens[r] == 0`` is padding. Rows of padding requests, and rows behind the last request,
    become zero. Cache content behind a request's length, or before the window of its first new
    token, is never used, whatever it holds (NaN included). All lengths and tables are read when the
    op runs, never when it is captured.

    Args:
        query: [T, Hq, D]; Hq is a multiple of Hkv (grouped-query attention).
        key_cache: [N, B, Hkv, D], N blocks of B slots.
        value_cache: [N, B, Hkv, D].
        block_tables: [R, M] int32, the blocks of each request in order.
        seq_lens: [R] int32, tokens of each request, the new ones included.
        query_start_loc: [R + 1] int32, ascending.
        out: [T, Hq, D], written in every row.
        scale: Factor of the scores before the softmax.
        sliding_window: A token sees itself and the ``sliding_window - 1`` tokens before it; 0: all.
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``; 0: unchanged.
        query_len: New tokens of every request if they all have the same number (decode phase),
            else 0. A hint for the choice of kernel; fixed per graph.
        key_scales: [N, Hkv, B] float32, what the keys are to be multiplied by if they are
            eight-bit codes; None: they are plain numbers. As little used behind a request's length
            as the cache.
        value_scales: The same of the values.
        prompt: T if there is one request and ``seq_lens`` says that it has T tokens; else, and
            where the host does not know, 0. A hint like ``query_len``.
    """
    out.zero_()
    group = query.shape[1] // key_cache.shape[2]
    starts = query_start_loc.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if seq_len == 0 or begin == end:
            continue
        blocks = block_tables[row, : math.ceil(seq_len / key_cache.shape[1])].long()
        keys, values = (
            rows_of(cache, scales, blocks)[:seq_len].repeat_interleave(group, dim=1)
            for cache, scales in ((key_cache, key_scales), (value_cache, value_scales))
        )
        if sliding_window > 0:
            values[: max(0, seq_len - (end - begin) - sliding_window + 1)] = 0.0
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].float(), keys) * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        visible = visibility(end - begin, seq_len, sliding_window, query.device)
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)


def rows_of(cache: Tensor, scales: Tensor | None, blocks: Tensor) -> Tensor:
    """The rows of some blocks as numbers: [len(blocks) * B, Hkv, D] float32."""
    if scales is None:
        return cache[blocks].flatten(0, 1).float()
    codes = cache.view(torch.uint8)[blocks].view(cache.dtype)
    return dequantise(codes, scales[blocks].transpose(1, 2)).flatten(0, 1)


def visibility(new: int, total: int, sliding_window: int, device: torch.device) -> Tensor:
    """Which of ``total`` keys each of the last ``new`` tokens may see: [new, total] bool."""
    query_position = torch.arange(total - new, total, device=device).unsqueeze(1)
    key_position = torch.arange(total, device=device).unsqueeze(0)
    seen = key_position <= query_position
    if sliding_window > 0:
        seen &= key_position > query_position - sliding_window
    return seen
