from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from reprise.ops.cases import LARGE, Arguments, Cases, Maker, Workload

_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "unfiltered": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 20, top-p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "flat, top-p 0.9": {"spread": 0.3, "top_p": 0.9},
}


def _small(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []  # logits are float32, whatever the model computes in
    return [
        {
            "logits": make.randn(4, 500) * 3,
            "temperature": make.floats(0.0, 0.7, 1.0, 1.3),
            "top_k": make.ints([0, 20, 0, 5], torch.int32),
            "top_p": make.floats(1.0, 0.9, 0.8, 1.0),
            "min_p": make.floats(0.0, 0.0, 0.05, 0.0),
            "seeds": make.ints([1, 2, 3, 4]),
            "positions": make.ints([0, 1, 2, 3]),
        }
    ]


def _workload(make: Maker, rows: int, name: str, kind: Mapping[str, Any]) -> Workload:
    def arguments() -> Arguments:
        logits = make.randn(rows, LARGE.vocab, dtype=torch.float32)
        return {
            "logits": logits * kind.get("spread", 3.0),
            "temperature": make.full(rows, kind.get("temperature", 1.0)),
            "top_k": make.full(rows, kind.get("top_k", 0), torch.int32),
            "top_p": make.full(rows, kind.get("top_p", 1.0)),
            "min_p": make.full(rows, kind.get("min_p", 0.0)),
            "seeds": make.ints(range(rows)),
            "positions": make.full(rows, 3, torch.int64),
        }

    return Workload(
        f"R={rows}, {name}",
        arguments,
        read_write=4 * rows * LARGE.vocab,
        exact=True,
        compiled=rows == 1 and name == "unfiltered",
    )


def _workloads(make: Maker) -> Iterator[Workload]:
    for rows in (1, 64):
        for name, kind in _KINDS.items():
            yield _workload(make, rows, name, kind)


cases = Cases(_small, _workloads)
