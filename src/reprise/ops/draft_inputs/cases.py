from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.cases import BLOCK_SIZE, Arguments, Cases, Maker, Workload
from reprise.ops.step.cases import ROWS, numbers_of

_BLOCKS = 16
_QUERY_LEN = 4


def _case(
    make: Maker,
    requests: int,
    *,
    chunks: int = 0,
    chosen: list[int] | None = None,
    shifted: bool = True,
    greedy: bool = False,
    width: int = 4,
    padding: int = 0,
    rows: int = ROWS,
    blocks: int = _BLOCKS,
) -> Arguments:
    """``requests`` that verify drafts, then ``chunks`` of three known tokens, in descending rows;
    ``padding`` requests behind those that drafts are made for."""
    live = requests + chunks
    counts = [_QUERY_LEN] * requests + [3] * chunks
    starts = [sum(counts[:each]) for each in range(live)] + [sum(counts)]
    numbers = numbers_of(make, rows, _QUERY_LEN - 1)
    which = list(range(rows - 1, rows - 1 - live, -1))
    numbers[3, which[:requests]] = make.ints([1 + each % _QUERY_LEN for each in range(requests)])
    integers = torch.cat([numbers, make.randint(1 << 40, 1, rows), make.randint(50, 1, rows)])
    chosen = list(range(live)) if chosen is None else chosen
    padded = len(chosen) + padding
    tokens = starts[-1]
    per_request = {"last": torch.int64, "rows": torch.int64}
    behind = {"seq_lens": torch.int32, "accepted": torch.int32, "fresh": torch.bool}
    draws = {
        "temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32,
        "min_p": torch.float32, "seed": torch.int64, "number": torch.int64,
    }  # fmt: skip

    def outputs(kinds: dict[str, torch.dtype]) -> Arguments:
        return {name: make.full(padded, 1000, kind) for name, kind in kinds.items()}

    return {
        "integers": integers,
        "floats": make.randn(6, rows, dtype=torch.float32).abs(),
        "step_rows": make.ints(which),
        "known": make.ints([0] * requests + [3] * chunks, torch.int32),
        "query_start_loc": make.ints(starts, torch.int32),
        "step_ids": make.randint(50, tokens),
        "told": make.ints([-1] * requests + [60 + each for each in range(chunks)]),
        "chosen": make.ints(chosen),
        "tables": make.randint(90, 2, rows, blocks, dtype=torch.int32) + 1,
        "block_sizes": make.ints([BLOCK_SIZE, 4]),
        "shifted_ids": make.randint(50, tokens + padding) + 1000 if shifted else None,
        **outputs(per_request),
        "token_ids": make.randint(50, padded * width) + 1000,
        "positions": make.randint(50, padded * width) + 1000,
        "slots": make.randint(50, 2, padded * width) + 1000,
        **outputs(behind),
        **outputs(draws),
        "width": width,
        "back": 0 if shifted else 1,
        "greedy": greedy,
    }


def _small(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []  # nothing depends on what the model computes in
    return [
        _case(make, 1, width=2),
        _case(make, 3, padding=2, greedy=True),
        _case(make, 3, shifted=False, width=5),
        _case(make, 2, chunks=2, chosen=[0, 1, 3], padding=1, width=3),
        _case(make, 0, chunks=2, chosen=[], width=1, padding=1),
        _case(make, 2, chunks=1, chosen=[2], shifted=False, width=2, padding=2),
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for requests, shifted in ((1, True), (64, True), (64, False)):

        def arguments(requests: int = requests, shifted: bool = shifted) -> Arguments:
            return _case(
                make, requests, shifted=shifted, width=2 if shifted else 4, rows=requests + 1,
                blocks=2048,
            )  # fmt: skip

        yield Workload(
            f"R={requests}, {'a head' if shifted else 'a model'}",
            arguments,
            read_write=requests * 400,
            exact=True,
            compiled=requests > 1,
        )


cases = Cases(_small, _workloads)
