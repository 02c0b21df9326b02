"""Rows between ranks, over gloo: ranks are threads, each with a process group of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist

from reprise.distributed import Communicator, Group
from reprise.distributed.communicator import _make

T = TypeVar("T")


def on_each(size: int, compute: Callable[[Communicator], T]) -> list[T]:
    """What it gives on each of so many ranks."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        group = Group("threads", rank, size)
        ranks = Communicator(group, _make(group, "gloo", store, 60.0))
        try:
            return compute(ranks)
        finally:
            ranks.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_rank_gets_what_is_its(device: str, size: int, dtype: torch.dtype) -> None:
    """Parts of any lengths, none too, and parts of one length."""
    if device != "cpu":
        pytest.skip("gloo is for CPUs")
    rng = random.Random(size)
    turns = [[[rng.choice((0, 1, 5)) for _ in range(size)] for _ in range(size)] for _ in range(8)]
    turns[0] = [[0] * size for _ in range(size)]

    def part(turn: int, source: int, target: int, count: int) -> torch.Tensor:
        begin = 100 * turn + 10 * source + target
        return (torch.arange(3 * count).view(count, 3) + begin).to(dtype)

    def compute(ranks: Communicator) -> list[torch.Tensor]:
        own, found = ranks.group.rank, []
        for turn, counts in enumerate(turns):
            sent, received = counts[own], [each[own] for each in counts]
            x = torch.cat([part(turn, own, to, count) for to, count in enumerate(sent)])
            out = torch.full((sum(received), 3), -1, dtype=dtype)
            ranks.all_to_all(x, out, sent, received)
            found.append(out)
        even = torch.empty(2 * size, 3, dtype=dtype)
        ranks.all_to_all(torch.cat([part(50, own, to, 2) for to in range(size)]), even)
        return [*found, even]

    for own, found in enumerate(on_each(size, compute)):
        for turn, counts in enumerate(turns):
            parts = [part(turn, source, own, each[own]) for source, each in enumerate(counts)]
            assert torch.equal(found[turn], torch.cat(parts))
        parts = [part(50, source, own, 2) for source in range(size)]
        assert torch.equal(found[-1], torch.cat(parts))
