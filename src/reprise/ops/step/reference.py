import torch
from torch import Tensor

COMPUTED, LIMIT, PROMPT, ACCEPTED, NEXT = range(5)
"""Rows of ``numbers``, [4 + 1 + K, S] int64, what the device keeps of each of S requests: tokens
that are computed; most tokens of the request; tokens of its prompt; of its last step's drafted
tokens and the one before them, how many count (0: that step computed known tokens); and from NEXT
on its newest token, which is not computed yet, with the K tokens drafted behind it, -1 where there
is none."""


def lay_out(
    numbers: Tensor,
    rows: Tensor,
    known: Tensor,
    query_start_loc: Tensor,
    tables: Tensor,
    block_sizes: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    draws: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    accepted: Tensor,
    fresh: Tensor,
    query_len: int,
) -> None:
    """Write the inputs of a step that depend on where its requests stand.

    A request computes the tokens behind its computed ones: first those that the caller has written
    to ``token_ids`` already, then the row's newest token and its drafts. Positions that are not
    below the row's limit go to the null block: a request may run past its end before the host
    knows of it. A request that stands at its limit has length 0, as padding has.

    Args:
        numbers: See :data:`NEXT`. Row 0 is the null row: all zeros.
        rows: [R] int64, each request's row; 0 for padding.
        known: [R] int32, how many of each request's tokens ``token_ids`` has.
        query_start_loc: [R + 1] int32, where each request's tokens begin; in a mixed step those
            from the last entry on are padding.
        tables: [L, R, M] int32, block tables of L lifetimes.
        block_sizes: [L] int64, tokens in a block of each.
        token_ids: [T] int64.
        positions: [T] int64; 0 for padding.
        draws: [T] int64: of the token that is drawn behind each token, its number among those that
            the request generates; 0 behind the last request.
        slots: [L, T] int64: where each token's rows go; 0 for padding.
        seq_lens: [R] int32: tokens of each request, this step's included; 0 for padding.
        accepted: [R] int32, each row's.
        fresh: [R] bool: nothing of the request is computed yet.
        query_len: Tokens of each request; 0: not equally many.
    """
    requests, tokens = rows.shape[0], token_ids.shape[0]
    start, limit = numbers[COMPUTED, rows], numbers[LIMIT, rows]
    place = torch.arange(tokens, device=rows.device)
    if query_len:
        request, live = place // query_len, rows.new_ones((), dtype=torch.bool)
        offset = place - request * query_len
        count = torch.full_like(rows, query_len)
    else:
        begins = query_start_loc.long()
        request = torch.searchsorted(begins[1:], place, right=True).clamp(max=requests - 1)
        live, offset = place < begins[-1], place - begins[request]
        count = begins[1:] - begins[:-1]
    ahead = offset - known[request]
    drafted = numbers[NEXT + ahead.clamp(0, numbers.shape[0] - NEXT - 1), rows[request]]
    ids = torch.where(ahead >= 0, drafted.clamp(min=0), token_ids)
    token_ids.copy_(torch.where(live, ids, 0))
    position = start[request] + offset
    inside = live & (position < limit[request])
    position = torch.minimum(position, (limit[request] - 1).clamp(min=0))
    positions.copy_(torch.where(live, position, 0))
    draws.copy_(torch.where(live, positions + 1 - numbers[PROMPT, rows][request], 0))
    for number in range(tables.shape[0]):
        size = block_sizes[number]
        block = tables[number, request, position // size].long()
        slots[number] = torch.where(inside, block * size + position % size, 0)
    seq_lens.copy_(torch.where((start < limit) & (count > 0), start + count, 0))
    accepted.copy_(numbers[ACCEPTED, rows])
    fresh.copy_(start == 0)


def advance(
    numbers: Tensor,
    rows: Tensor,
    known: Tensor,
    first_draw: Tensor,
    emitted: Tensor,
    drawn: Tensor,
) -> None:
    """Move rows on behind a step: accept drafts, take the newest token.

    Behind each of a request's last known token and its drafts a token was drawn. A draft counts if
    it is the token that was drawn in its place and those before it count; the draw behind the last
    one that counts is the request's newest token. So every token is one that was drawn behind
    tokens that were drawn.

    Args:
        numbers: See :data:`NEXT`; changed for each request's row, whose drafts become -1.
        rows: [R] int64, each request's row, all different but for the null row.
        known: [R] int32, tokens of each request whose ids the host knew; 0: the step computed its
            newest token and its drafts.
        first_draw: [R + 1] int32, where each request's draws begin.
        emitted: [R, 1 + K + 1] int64: new tokens of each request, -1 behind them, and last how many
            tokens had been drafted.
        drawn: [D] int64.
    """
    width = emitted.shape[1] - 1
    begins = first_draw.long()
    there = begins[1:] - begins[:-1]
    turn = torch.arange(width, device=rows.device)
    place = begins[:-1, None] + turn
    if drawn.shape[0] == 0:
        drawn = drawn.new_full((1,), -1)
    got = drawn[place.clamp(max=drawn.shape[0] - 1)]
    drafts = numbers[NEXT + 1 :, rows].T
    agrees = (got[:, :-1] == drafts) & (turn[1:] < there[:, None])
    count = torch.where(there > 0, 1 + agrees.long().cumprod(1).sum(1), 0)
    emitted[:, :-1] = torch.where(turn < count[:, None], got, -1)
    emitted[:, -1] = ((drafts >= 0) & (turn[1:] < there[:, None])).sum(1)
    last = got.gather(1, (count - 1).clamp(min=0)[:, None]).squeeze(1)
    decodes = (known == 0) & (rows != 0)
    forward = torch.where(decodes, count, known.long())
    numbers[COMPUTED, rows] = torch.minimum(numbers[COMPUTED, rows] + forward, numbers[LIMIT, rows])
    numbers[ACCEPTED, rows] = torch.where(decodes, count, 0)
    numbers[NEXT, rows] = torch.where(there > 0, last, numbers[NEXT, rows])
    numbers[NEXT + 1 :, rows] = torch.where(rows != 0, -1, 0)
