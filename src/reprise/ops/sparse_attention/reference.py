import torch
from torch import Tensor

from reprise.ops.indexer.reference import CHUNK, row_places
from reprise.ops.latent_rows import load
from reprise.ops.paged_attention.reference import visibility


def reference(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    compressed: Tensor | None,
    compressed_tables: Tensor | None,
    selected: Tensor | None,
    sinks: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int,
    every: int,
    query_len: int,
    cache_tail: Tensor | None = None,
    scales: Tensor | None = None,
    compressed_tail: Tensor | None = None,
    compressed_scales: Tensor | None = None,
) -> None:
    """Attention over a window of token rows and over rows of many tokens each, one softmax of all.

    A row is key and value of all heads. A token at position p sees the rows of the last
    ``sliding_window`` tokens, its own included, and of the compressed rows either those that are
    selected for it or the first ``(p + 1) // every``: what is whole with its own token. Each head
    has a sink, a score without a value (Xiao et al. 2023): it counts in the sum of the softmax.

    Rows of padding requests, and rows behind the last request, become zero. Cache content behind a
    request's length, or before the window of its first new token, is never used.

    Args:
        query: [T, H, D].
        cache: [N, B, D], rows of tokens.
        block_tables: [R, M] int32, the blocks of each request in ``cache``.
        compressed: [N', B', D], rows of ``every`` tokens each; None: there are none.
        compressed_tables: [R, M'] int32, the blocks of each request there; or None.
        selected: [T, K] int32: those that a token sees, ``block * B' + offset``, and 0 for none;
            None: all that are whole.
        sinks: [H] float32, not multiplied by ``scale``.
        seq_lens: [R] int32, tokens of each request, the new ones included; 0: padding.
        query_start_loc: [R + 1] int32, ascending.
        out: [T, H, D], written in every row.
        scale: Factor of the scores.
        sliding_window: At least 1.
        every: Tokens of a compressed row.
        query_len: New tokens of every request if they all have the same number, else 0.
        cache_tail: [N, B, R], the last channels of rows in ``cache``, where that has codes
            [N, B, G, (D - R) / G] (:mod:`reprise.ops.latent_rows`).
        scales: [N, G, B] float32 of these codes.
        compressed_tail: As ``cache_tail``, of ``compressed``.
        compressed_scales: As ``scales``, of ``compressed``.
    """
    out.zero_()
    starts = query_start_loc.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        for first in range(begin, end if seq_len else begin, CHUNK):
            last = min(first + CHUNK, end)
            length = seq_len - (end - last)
            visible = visibility(last - first, length, sliding_window, out.device)
            oldest = max(0, length - (last - first) - sliding_window + 1)
            places = row_places(block_tables[row], length, cache.shape[1])[oldest:]
            groups = [(load(places, cache, cache_tail, scales), visible[:, oldest:])]
            if compressed is not None and selected is not None:
                chosen = selected[first:last].long()
                rows = load(chosen, compressed, compressed_tail, compressed_scales)
                real = chosen > 0
                groups.append((rows.masked_fill(~real.unsqueeze(2), 0.0), real))
            elif compressed is not None and compressed_tables is not None and length >= every:
                count = length // every
                places = row_places(compressed_tables[row], count, compressed.shape[1])
                position = torch.arange(length - (last - first), length, device=out.device)
                number = torch.arange(count, device=out.device)
                whole = number < ((position + 1) // every).unsqueeze(1)
                rows = load(places, compressed, compressed_tail, compressed_scales)
                groups.append((rows, whole))
            out[first:last] = _attend(query[first:last].float() * scale, groups, sinks).to(
                out.dtype
            )


def _attend(query: Tensor, groups: list[tuple[Tensor, Tensor]], sinks: Tensor) -> Tensor:
    """query: [T, H, D]; of each group rows [S, D], or [T, S, D], and which of them a token sees,
    [T, S]."""
    scores = []
    for rows, seen in groups:
        found = torch.einsum("thd,sd->ths" if rows.dim() == 2 else "thd,tsd->ths", query, rows)
        scores.append(found.masked_fill(~seen.unsqueeze(1), -torch.inf))
    sink = sinks.float().view(1, -1, 1).expand(len(query), -1, 1)
    weights = torch.cat((*scores, sink), dim=2).softmax(dim=2)
    total = torch.zeros_like(query)
    begin = 0
    for rows, _ in groups:
        part = weights[:, :, begin : begin + rows.shape[-2]]
        total += torch.einsum("ths,sd->thd" if rows.dim() == 2 else "ths,tsd->thd", part, rows)
        begin += rows.shape[-2]
    return total
