from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.cases import LARGE, Arguments, Cases, Maker, Workload


def _small(make: Maker) -> list[Arguments]:
    words = [-1, 0, 1, -(2**31), 0x55555555, 2**31 - 1, -2]
    return [
        {
            "logits": make.randn(4, vocab),
            "which": make.ints(which),
            "bits": make.ints(words, torch.int32).repeat(4, 3)[:, : -(-vocab // 32)],
        }
        for vocab, which in ((37, [-1, -1, 2, -1]), (500, [3, 0, -1, 3]), (640, [0, 1, 2, 3]))
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for rows in (1, 64):

        def arguments(rows: int = rows) -> Arguments:
            return {
                "logits": make.randn(rows, LARGE.vocab),
                "which": make.ints(range(rows)),
                "bits": make.randint(1 << 30, rows, -(-LARGE.vocab // 32), dtype=torch.int32),
            }

        yield Workload(
            f"M={rows}", arguments, read_write=(2 + 4) * rows * LARGE.vocab, compiled=rows == 1
        )


cases = Cases(_small, _workloads)
