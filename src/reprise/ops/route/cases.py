"""Cases of routing: logits as they come, tied ones, all scorings, padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from reprise.ops.cases import Arguments, Cases, Maker, Workload


def _arguments(
    make: Maker, rows: int, experts: int, top: int, live: int, scoring: str = "softmax",
    *, renormalize: bool = True, scale: float = 1.0, biased: bool = False, given: bool = False,
) -> Arguments:  # fmt: skip
    return {
        "logits": make.randn(rows, experts),
        "live": make.ints([live], torch.int32),
        "weights": make.randn(rows, top, dtype=torch.float32),
        "ids": make.randint(experts, rows, top, dtype=torch.int32),
        "scoring": scoring,
        "renormalize": renormalize,
        "scale": scale,
        "bias": make.randn(experts, dtype=torch.float32) if biased else None,
        "chosen": make.randint(experts, rows, top) if given else None,
    }


def _small(make: Maker) -> list[Arguments]:
    tied = _arguments(make, 4, 12, 5, 4)
    tied["logits"] = make.ints([3, 1, 3, 3, 0, 3, 1, 1, 2, 2, 3, 0]).to(make.dtype).repeat(4, 1)
    strided = _arguments(make, 5, 16, 4, 5)
    strided["logits"] = make.randn(5, 17)[:, :16]
    return [
        _arguments(make, 1, 8, 2, 1),
        _arguments(make, 9, 60, 4, 9, renormalize=False),
        _arguments(make, 7, 128, 8, 4),
        tied,
        strided,
        _arguments(make, 3, 32, 6, 2, "sigmoid", scale=2.5, biased=True),
        _arguments(make, 3, 24, 6, 3, "sqrtsoftplus", scale=1.5, biased=True),
        _arguments(make, 3, 24, 6, 2, "sqrtsoftplus", scale=1.5, given=True),
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for rows in (1, 64, 4096):

        def arguments(rows: int = rows) -> Arguments:
            return _arguments(make, rows, 128, 8, rows)

        yield Workload(
            f"30B-A3B, T={rows}",
            arguments,
            read_write=2 * rows * 128 + 8 * rows * 8,
            compiled=rows < 4096,
        )


cases = Cases(_small, _workloads)
