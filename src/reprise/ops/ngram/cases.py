from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.cases import Arguments, Cases, Maker, Workload
from reprise.ops.step.reference import COMPUTED, NEXT


def _arguments(
    make: Maker, requests: int, context: int, width: int, drafts: int, vocab: int
) -> Arguments:
    """Texts of few different tokens, or of many; the last request has no new token."""
    numbers = torch.zeros(NEXT + 1 + drafts, requests + 2, dtype=torch.int64)
    numbers[COMPUTED, 1:] = context - 2 - torch.arange(requests + 1) % 5
    numbers[NEXT + 1 :] = -7
    emitted = make.randint(vocab, requests, width)
    counts = torch.arange(requests) % width + 1
    counts[-1] = 0 if requests > 1 else 1
    tokens = make.randint(vocab, requests + 2, context, dtype=torch.int32)
    for number, count in enumerate(counts.tolist()):
        row = requests - number
        newest = int(numbers[COMPUTED, row])
        tokens[row, newest + 1 - count : newest + 1] = vocab  # not written yet
    behind = torch.arange(width) >= counts[:, None]
    emitted.masked_fill_(behind.to(make.device), -1)
    return {
        "numbers": numbers.to(make.device),
        "tokens": tokens,
        "rows": make.ints(range(requests, 0, -1)),
        "emitted": emitted,
        "most": 5,
        "least": 2,
        "drafts": drafts,
    }


def _small(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []  # nothing depends on what the model computes in
    shapes = [(1, 40, 1, 1, 3), (5, 40, 4, 3, 2), (3, 1500, 2, 1, 4)]
    return [_arguments(make, *shape) for shape in shapes]


def _workloads(make: Maker) -> Iterator[Workload]:
    for requests in (1, 64):

        def arguments(requests: int = requests) -> Arguments:
            return _arguments(make, requests, 32768, 4, 3, 1000)

        yield Workload(
            f"R={requests}, 32K tokens",
            arguments,
            read_write=requests * 32768 * 4,
            exact=True,
            compiled=requests > 1,
        )


cases = Cases(_small, _workloads)
