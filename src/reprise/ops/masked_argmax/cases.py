from collections.abc import Iterator

import torch

from reprise.ops.cases import LARGE, Arguments, Cases, Maker, Workload


def _small(make: Maker) -> list[Arguments]:
    words = [-1, 0, 1, -(2**31), 0x55555555, 2**31 - 1, -2]
    return [
        {
            "logits": make.randn(len(which), vocab),
            "which": make.ints(which),
            "bits": make.ints(words, torch.int32).repeat(3, -(-vocab // 224))[:, : -(-vocab // 32)],
            "peaks": make.randn(len(which)),
        }
        for vocab, which in ((37, [0]), (500, [-1, 2, 0, 1]), (9000, [1, -1]))
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for rows in (1, 64):

        def arguments(rows: int = rows) -> Arguments:
            return {
                "logits": make.randn(rows, LARGE.vocab),
                "which": make.ints(range(rows)),
                "bits": make.randint(1 << 30, rows, -(-LARGE.vocab // 32), dtype=torch.int32),
                "peaks": make.randn(rows),
            }

        yield Workload(
            f"R={rows}",
            arguments,
            read_write=2 * rows * LARGE.vocab,
            exact=True,
            compiled=rows == 1,
        )


cases = Cases(_small, _workloads)
