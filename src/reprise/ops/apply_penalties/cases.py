from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.apply_penalties.reference import IN_PROMPT
from reprise.ops.cases import LARGE, Arguments, Cases, Maker, Workload


def _small(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []  # logits are float32, whatever the model computes in
    seen = make.ints([0, 1, 3, IN_PROMPT, IN_PROMPT + 2], torch.int32).repeat(3, 100)
    return [
        {
            "logits": make.randn(4, 500) * 3,
            "rows": make.ints([3, 0]),
            "seen": seen,
            "slots": make.ints([1, 2]),
            "repetition": make.floats(1.3, 1.0),
            "presence": make.floats(0.0, 0.5),
            "frequency": make.floats(0.2, 0.7),
            "drafted": drafted,
        }
        for drafted in (make.ints([]).view(2, 0), make.ints([7, -1, 7, 7, 3, 2]).view(2, 3))
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for rows in (1, 64):

        def arguments(rows: int = rows) -> Arguments:
            number, strength = make.ints(range(rows)), make.full(rows, 1.1)
            return {
                "logits": make.randn(rows, LARGE.vocab, dtype=torch.float32),
                "rows": number,
                "seen": make.randint(3, rows, LARGE.vocab, dtype=torch.int32),
                "slots": number,
                "repetition": strength,
                "presence": strength,
                "frequency": strength,
                "drafted": make.randint(LARGE.vocab, rows, 3),
            }

        yield Workload(
            f"R={rows}", arguments, read_write=3 * 4 * rows * LARGE.vocab, compiled=rows == 1
        )


cases = Cases(_small, _workloads)
