from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.cases import BLOCK_SIZE, Arguments, Cases, Maker, Workload
from reprise.ops.step.reference import COMPUTED, LIMIT, NEXT, PROMPT

ROWS = 6
"""The null row and five requests, of which the last stands at its limit."""


def numbers_of(make: Maker, rows: int, drafts: int) -> torch.Tensor:
    numbers = torch.zeros(NEXT + 1 + drafts, rows, dtype=torch.int64)
    requests = torch.arange(1, rows)
    numbers[COMPUTED, 1:] = 3 * requests
    numbers[LIMIT, 1:] = 3 * requests + 20
    numbers[LIMIT, -1] = numbers[COMPUTED, -1]
    numbers[PROMPT, 1:] = 2 * requests
    numbers[NEXT:, 1:] = torch.arange(1 + drafts)[:, None] + 7 * requests
    numbers[NEXT + 1 :, 1] = -1
    return numbers.to(make.device)


def _lay_out(
    make: Maker, counts: list[int], known: list[int], drafts: int, query_len: int, padding: int = 0
) -> Arguments:
    """Requests in descending rows, and ``padding`` tokens and requests behind them."""
    live, requests = len(counts), len(counts) + padding
    rows = [*range(ROWS - 1, ROWS - 1 - live, -1), *([0] * padding)]
    starts = [sum(counts[:number]) for number in range(live + 1)] + [sum(counts)] * padding
    tokens = starts[-1] + padding * max(1, query_len)
    tables = make.randint(90, 2, requests, 16, dtype=torch.int32) + 1
    tables[:, live:] = 0
    return {
        "numbers": numbers_of(make, ROWS, drafts),
        "rows": make.ints(rows),
        "known": make.ints([*known, *([0] * padding)], torch.int32),
        "query_start_loc": make.ints(starts, torch.int32),
        "tables": tables,
        "block_sizes": make.ints([BLOCK_SIZE, 4]),
        "token_ids": make.randint(50, tokens),
        "positions": make.randint(50, tokens),
        "draws": make.randint(1, tokens),
        "slots": make.randint(50, 2, tokens),
        "seq_lens": make.randint(50, requests, dtype=torch.int32),
        "accepted": make.randint(50, requests, dtype=torch.int32) + 1,
        "fresh": make.ints([1] * requests).bool(),
        "query_len": query_len,
    }


def _lay_outs(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []  # nothing depends on what the model computes in
    return [
        _lay_out(make, [1], [0], 0, 1),
        _lay_out(make, [1, 1, 1], [0, 0, 0], 0, 1, padding=2),
        _lay_out(make, [4, 4, 4], [0, 0, 0], 3, 4, padding=1),
        _lay_out(make, [4, 4, 7, 1], [0, 0, 7, 1], 3, 0, padding=3),
    ]


def _advances(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []
    found = []
    for drafts, known, first in ((0, [0, 0], [0, 1, 2]), (3, [0, 0, 5, 5], [0, 4, 8, 9, 9])):
        numbers = numbers_of(make, ROWS, drafts)
        drawn = make.randint(50, first[-1])
        rows = list(range(ROWS - 1, ROWS - 1 - len(known), -1))
        if drafts:
            drawn[:2] = numbers[NEXT + 1 : NEXT + 3, rows[0]]
        found.append(
            {
                "numbers": numbers,
                "rows": make.ints(rows),
                "known": make.ints(known, torch.int32),
                "first_draw": make.ints(first, torch.int32),
                "emitted": make.randint(50, len(rows), 2 + drafts) + 9,
                "drawn": drawn,
            }
        )
    return found


def _large(make: Maker, requests: int, query_len: int) -> Iterator[tuple[str, Arguments]]:
    """Decodes of as many tokens each, and as many prompts."""
    tokens, rows = requests * max(1, query_len), make.ints(range(1, requests + 1))
    drafts = max(0, query_len - 1)
    starts = make.ints(range(0, tokens + 1, max(1, query_len)), torch.int32)
    numbers = numbers_of(make, requests + 1, drafts)
    known = make.ints([0 if query_len else 1] * requests, torch.int32)
    shared = {"numbers": numbers, "rows": rows, "known": known}
    yield (
        "lay_out",
        {
            **shared,
            "query_start_loc": starts,
            "tables": make.randint(90, 1, requests, 2048, dtype=torch.int32),
            "block_sizes": make.ints([BLOCK_SIZE]),
            "token_ids": make.randint(50, tokens),
            "positions": make.randint(50, tokens),
            "draws": make.randint(50, tokens),
            "slots": make.randint(50, 1, tokens),
            "seq_lens": make.randint(50, requests, dtype=torch.int32),
            "accepted": make.randint(50, requests, dtype=torch.int32) + 1,
            "fresh": make.ints([1] * requests).bool(),
            "query_len": query_len,
        },
    )
    yield (
        "advance",
        {
            **shared,
            "first_draw": starts,
            "emitted": make.randint(50, requests, 2 + drafts),
            "drawn": make.randint(50, tokens),
        },
    )


def _workloads(op: str) -> Cases:
    def workloads(make: Maker) -> Iterator[Workload]:
        for requests, query_len in ((1, 1), (64, 1), (64, 4), (64, 0)):

            def arguments(requests: int = requests, query_len: int = query_len) -> Arguments:
                return dict(_large(make, requests, query_len))[op]

            yield Workload(
                f"R={requests}, {query_len or 'known'} tokens each",
                arguments,
                read_write=requests * max(1, query_len) * 64,
                exact=True,
                compiled=requests > 1,
            )

    return Cases({"lay_out": _lay_outs, "advance": _advances}[op], workloads)


lay_out_cases, advance_cases = _workloads("lay_out"), _workloads("advance")
