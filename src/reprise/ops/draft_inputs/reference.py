import torch
from torch import Tensor

from reprise.ops.step.reference import ACCEPTED, COMPUTED, LIMIT, NEXT, PROMPT

TEMPERATURE, TOP_P, MIN_P = range(3)
"""The first rows of ``floats``."""


def reference(
    integers: Tensor,
    floats: Tensor,
    step_rows: Tensor,
    known: Tensor,
    query_start_loc: Tensor,
    step_ids: Tensor,
    told: Tensor,
    chosen: Tensor,
    tables: Tensor,
    block_sizes: Tensor,
    shifted_ids: Tensor | None,
    last: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    accepted: Tensor,
    fresh: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    number: Tensor,
    width: int,
    back: int,
    greedy: bool,
) -> None:
    """Write the inputs of a draft model behind a step whose rows have moved on.

    Its prefill takes in each row of the step the id of the token behind: that of the next row, and
    behind the last token of a request that counts the one that was drawn, or that the host knows.
    Rows of drafts that do not count may take any id.

    Its chain has ``width`` tokens of each chosen request, from ``back`` before the request's newest
    one on. The token before that one is the step's last that counts; those behind it are yet to be
    drafted, and are 0. Positions that are not below the row's limit go to the null block.

    Args:
        integers: [4 + 1 + K + 2, S] int64: what ``ops.lay_out`` calls ``numbers``, then of each
            row's draws the seed and how many of the likeliest tokens they are limited to.
        floats: [3 or more, S] float32: of each row's draws the temperature, ``top_p``, ``min_p``.
        step_rows: [R] int64, the row of each request of the step.
        known: [R] int32, tokens of each that the host knew; 0: it verified drafts.
        query_start_loc: [R + 1] int32, where the tokens of each begin.
        step_ids: [T] int64.
        told: [R] int64, the token behind the last one of each request that counts, where the host
            knows it; -1: it was drawn.
        chosen: [C] int64, which of the step's requests drafts are made for.
        tables: [L, S, M] int32, block tables of L lifetimes, of each row.
        block_sizes: [L] int64, tokens in a block of each.
        shifted_ids: [T or more] int64, of the prefill; 0 behind T. None: they are not taken.
        last: [C or more] int64: of each chosen request the last token of the step that counts, by
            its place in the step. This and all that follow have D requests; those behind C are
            padding: all 0.
        rows: [D] int64.
        token_ids: [D * width] int64.
        positions: [D * width] int64.
        slots: [L, D * width] int64: where each token's rows go.
        seq_lens: [D] int32: tokens of each request, the chain's included; 0 at its limit.
        accepted: [D] int32, each row's.
        fresh: [D] bool: nothing before the chain.
        temperature: [D] float32, as ``ops.sample`` takes it; likewise ``top_k`` int32, ``top_p``
            and ``min_p`` float32, ``seed`` int64.
        number: [D] int64: of the token that is drawn behind the newest one, its number among those
            that the request generates.
        width: Tokens of each request in the chain.
        back: 0 or 1.
        greedy: The likeliest tokens are drafted: temperatures are 0.
    """
    device = step_rows.device
    counted = integers[ACCEPTED, step_rows]
    ends = (query_start_loc[:-1].long() + known + counted - 1).clamp(min=0)
    if shifted_ids is not None:
        tokens = step_ids.shape[0]
        shifted_ids.zero_()
        shifted_ids[: tokens - 1] = step_ids[1:]
        place = torch.arange(tokens, device=device)
        request = torch.searchsorted(query_start_loc[1:].long(), place, right=True)
        request = request.clamp(max=step_rows.shape[0] - 1)
        newest = torch.where(told >= 0, told, integers[NEXT, step_rows])
        behind = place == ends[request]
        shifted_ids[:tokens] = torch.where(behind, newest[request], shifted_ids[:tokens])
    for each in (
        last, rows, token_ids, positions, slots, seq_lens, accepted, fresh, temperature, top_k,
        top_p, min_p, seed, number,
    ):  # fmt: skip
        each.zero_()
    count = chosen.shape[0]
    row = step_rows[chosen]
    rows[:count] = row
    last[:count] = ends[chosen]
    start, limit = (integers[COMPUTED, row] - back).clamp(min=0), integers[LIMIT, row]
    ids = token_ids[: count * width].view(count, width)
    if back:
        ids[:, 0] = step_ids[ends[chosen]]
    if width > back:
        ids[:, back] = integers[NEXT, row].clamp(min=0)
    place = start[:, None] + torch.arange(width, device=device)
    inside = place < limit[:, None]
    place = torch.minimum(place, (limit - 1).clamp(min=0)[:, None])
    positions[: count * width] = place.reshape(-1)
    for table, size, slot in zip(tables, block_sizes, slots, strict=True):
        block = table[row[:, None], place // size].long()
        slot[: count * width] = torch.where(inside, block * size + place % size, 0).reshape(-1)
    seq_lens[:count] = torch.where(start < limit, start + width, 0).int()
    accepted[:count] = integers[ACCEPTED, row].int()
    fresh[:count] = start == 0
    if not greedy:
        temperature[:count] = floats[TEMPERATURE, row]
    top_p[:count], min_p[:count] = floats[TOP_P, row], floats[MIN_P, row]
    seed[:count] = integers[-2, row]
    top_k[:count] = integers[-1, row].int()
    first = torch.minimum(start + back, (limit - 1).clamp(min=0))
    number[:count] = first + 1 - integers[PROMPT, row]
