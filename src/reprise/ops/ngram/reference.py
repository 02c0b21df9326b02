import torch
from torch import Tensor

from reprise.ops.step.reference import COMPUTED, NEXT


def reference(
    numbers: Tensor,
    tokens: Tensor,
    rows: Tensor,
    emitted: Tensor,
    most: int,
    least: int,
    drafts: int,
) -> None:
    """Write down new tokens, and draft what followed the same tokens earlier in the text.

    Of all earlier places whose last tokens are those that the text ends with, the one with the
    most equal ones counts, up to ``most``; of several the earliest (prompt lookup, Saxena 2023;
    which place is taken follows vLLM). The tokens behind it are the drafts, as far as there are
    any. With fewer than ``least`` equal tokens there are none.

    Args:
        numbers: As of ``ops.advance``, which has moved the rows on; their drafts are replaced.
        tokens: [S, L] int32: the text of each row.
        rows: [R] int64, rows of requests, all different.
        emitted: [R, W] int64 with W of at least 1: each row's new tokens, -1 behind them. Those
            without any draft nothing.
        most: Most tokens to compare.
        least: Fewest.
        drafts: Tokens to draft, at most what ``numbers`` has room for.
    """
    length = tokens.shape[1]
    counts = (emitted >= 0).sum(dim=1)
    newest = numbers[COMPUTED, rows]
    turn = torch.arange(emitted.shape[1], device=rows.device)
    places = newest[:, None] + 1 - counts[:, None] + turn
    there = (turn < counts[:, None]) & (places < length)
    kept = tokens[rows].long()
    places = places.clamp(min=0, max=length - 1)
    # Behind the new tokens there is nothing yet, so a place twice is written once.
    source = torch.where(there, emitted, -1)
    for column in range(emitted.shape[1]):
        place = places[:, column : column + 1]
        old = kept.gather(1, place)
        new = source[:, column : column + 1]
        kept.scatter_(1, place, torch.where(new >= 0, new, old))
    tokens[rows] = kept.to(tokens.dtype)

    end = (newest + 1).clamp(max=length)  # of the text
    ends = torch.arange(length, device=rows.device)  # of what may be like its end
    equal = torch.zeros(len(rows), length, dtype=torch.int64, device=rows.device)
    goes_on = (ends >= 1) & (ends < end[:, None])
    for back in range(1, most + 1):
        last = kept.gather(1, (end[:, None] - back).clamp(min=0))
        earlier = kept.roll(back, dims=1)
        goes_on = goes_on & (ends >= back) & (end[:, None] >= back) & (earlier == last)
        equal += goes_on
    best, place = (equal * (length + 1) + (length - ends)).max(dim=1)
    found = (best // (length + 1) >= least) & (counts > 0)
    ahead = place[:, None] + torch.arange(drafts, device=rows.device)
    inside = found[:, None] & (ahead < end[:, None])
    drafted = torch.where(inside, kept.gather(1, ahead.clamp(max=length - 1)), -1)
    numbers[NEXT + 1 : NEXT + 1 + drafts, rows] = drafted.T
