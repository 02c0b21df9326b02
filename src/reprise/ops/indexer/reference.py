import torch
from torch import Tensor

from reprise.ops.latent_rows import load

CHUNK = 128
"""Tokens that are scored at once."""


def reference(
    query: Tensor,
    weights: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    every: int,
    scale: float,
    query_len: int,
    scales: Tensor | None = None,
) -> None:
    """Choose the compressed rows that each token attends to.

    The score of a row is ``scale * sum_h weights[t, h] * relu(query[t, h] . key)``, in float32. A
    token at position p sees the rows of whole groups of ``every`` tokens up to its own, the first
    ``(p + 1) // every`` of its request. Of these the K of the largest scores are chosen, of equal
    ones the earlier row; all, where there are no more.

    Rows of padding requests, and rows behind the last request, become zero. Cache content behind a
    request's length is never used.

    Args:
        query: [T, H, D], rotated.
        weights: [T, H] float32, rows may be strided.
        keys: [N, B, D], N blocks of B rows; numbers, or codes.
        block_tables: [R, M] int32.
        seq_lens: [R] int32, tokens of each request, the new ones included; 0: padding.
        query_start_loc: [R + 1] int32, ascending.
        out: [T, K] int32, written: ``block * B + offset`` of each chosen row, in the order of their
            tokens, and 0 behind them, where rows of no request are.
        every: Tokens of a row.
        scale: Factor of the scores.
        query_len: New tokens of every request if they all have the same number, else 0.
        scales: [N, B] float32 of keys that are codes (:mod:`reprise.ops.latent_rows`).
    """
    out.zero_()
    starts = query_start_loc.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        count = seq_len // every
        if begin == end or not count:
            continue
        places = row_places(block_tables[row], count, keys.shape[1])
        wide = load(places, keys, None, scales)
        top = min(out.shape[1], count)
        for first in range(begin, end, CHUNK):
            some = slice(first, min(first + CHUNK, end))
            position = torch.arange(some.start, some.stop, device=out.device) + seq_len - end
            seen = (position + 1) // every
            number = torch.arange(count, device=out.device)
            hidden = number >= seen.unsqueeze(1)
            scores = scored(query[some], weights[some], wide) * scale
            scores = scores.masked_fill(hidden, -torch.inf)
            order = scores.sort(dim=1, descending=True, stable=True).indices[:, :top]
            chosen = torch.where(order < seen.unsqueeze(1), order, count).sort(dim=1).values
            slots = torch.cat((places, places.new_zeros(1)))[chosen]
            out[some, :top] = slots.to(out.dtype)


def scored(query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Scores [T, S] float32 of ``keys`` [S, D] float32, head by head: never [T, H, S]."""
    total = torch.zeros(len(query), len(keys), dtype=torch.float32, device=keys.device)
    for head in range(query.shape[1]):
        total += weights[:, head, None].float() * (query[:, head].float() @ keys.t()).relu()
    return total


def row_places(table: Tensor, count: int, block: int) -> Tensor:
    """[count] int64: ``block * B + offset`` of a request's first rows."""
    number = torch.arange(count, device=table.device)
    return table[number // block].long() * block + number % block
