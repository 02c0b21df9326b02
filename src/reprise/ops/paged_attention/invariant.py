"""Paged attention on a host such that the bits of a token depend on its request's tokens alone.

Keys are taken in splits that begin at multiples of :data:`SPLIT`, wherever the query is and however
many tokens are computed with it; what the splits give is added in their order. Products have one
shape: :data:`ROWS` query heads of one KV head by the keys of a split.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reprise.ops.paged_attention.sdpa import seen_by, tokens_of

SPLIT = 64
"""Keys."""
ROWS = 16


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
    """Arguments as in the reference."""
    block_size = key_cache.shape[1]
    starts, tables = query_start_loc.tolist(), block_tables.tolist()
    caches = ((key_cache, key_scales), (value_cache, value_scales))
    out.zero_()
    for row, length in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if length == 0 or begin == end:
            continue
        new = end - begin
        first, place = seen_by(tables[row], block_size, length, new, sliding_window)
        keys, values = (
            _splits(tokens_of(*each, place, torch.float32).float(), first) for each in caches
        )
        request = _Request(keys, values, first // SPLIT * SPLIT, scale, sliding_window, soft_cap)
        out[begin:end] = request.attend(query[begin:end].float(), length - new).to(out.dtype)


def _splits(tokens: Tensor, first: int) -> Tensor:
    """[n, Hkv, D], of which the first is number ``first`` of its request, as [splits, Hkv, SPLIT,
    D]; zeros are where there is none."""
    count, heads, size = tokens.shape
    before = first % SPLIT
    padded = tokens.new_zeros(-(-(before + count) // SPLIT) * SPLIT, heads, size)
    padded[before : before + count] = tokens
    return padded.view(-1, SPLIT, heads, size).transpose(1, 2).contiguous()


class _Request:
    """One of a step.

    Args:
        keys: [splits, Hkv, SPLIT, D] float32.
        values: The same of the values.
        first: The position that the first split begins at.
        scale, window, soft_cap: As of the op.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, first: int, scale: float, window: int, soft_cap: float
    ) -> None:
        self.keys, self.values, self.first = keys, values, first
        self.scale, self.window, self.soft_cap = scale, window, soft_cap

    def attend(self, query: Tensor, position: int) -> Tensor:
        """query: [n, Hq, D] float32, of the tokens from ``position`` on. Returns as much."""
        new, _, size = query.shape
        heads = self.keys.shape[1]
        rows = query.view(new, heads, -1, size).transpose(0, 1).reshape(heads, -1, size)
        positions = torch.arange(position, position + new).repeat_interleave(rows.shape[1] // new)
        found = [
            self._tile(rows[:, begin : begin + ROWS], positions[begin : begin + ROWS])
            for begin in range(0, rows.shape[1], ROWS)
        ]
        whole = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return whole.view(heads, new, -1, size).transpose(0, 1).reshape(query.shape)

    def _tile(self, rows: Tensor, positions: Tensor) -> Tensor:
        """rows: [Hkv, up to ROWS, D], ascending by their positions. Returns as much."""
        heads, count, size = rows.shape
        least, most = int(positions[0]), int(positions[-1])
        if self.window > 0:
            least = max(0, least - self.window + 1)
        begin = (least - self.first) // SPLIT if self.window > 0 else 0
        end = (most - self.first) // SPLIT + 1
        query = rows.new_zeros(end - begin, heads, ROWS, size)
        query[:, :, :count] = rows
        scores = _products(query, self.keys[begin:end].transpose(2, 3)) * self.scale
        if self.soft_cap > 0:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        key_positions = torch.arange(begin * SPLIT, end * SPLIT).add_(self.first).view(-1, 1, SPLIT)
        seen = key_positions <= positions.view(-1, 1)
        if self.window > 0:
            seen &= key_positions > (positions - self.window).view(-1, 1)
        # What is not seen adds zeros, so it does not matter how many such splits there are.
        scores = scores[:, :, :count].masked_fill(~seen.unsqueeze(1), -math.inf)
        weights = torch.exp(scores - scores.amax(dim=(0, 3), keepdim=True))
        padded = query.new_zeros(*query.shape[:3], SPLIT)
        padded[:, :, :count] = weights
        sums = padded.sum(dim=-1, keepdim=True)
        products = _products(padded, self.values[begin:end])
        total, weight = products[0], sums[0]
        for split in range(1, end - begin):
            total, weight = total + products[split], weight + sums[split]
        return (total / weight)[:, :count]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Of [splits, Hkv, ...] matrices each."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
