"""One rank of rows that are pushed to where their experts are and back, its kernels run by Triton's
interpreter."""

from __future__ import annotations

import random
import sys
import time

import torch
from sum_child import Shared

from reprise.distributed import Communicator, Group
from reprise.distributed.communicator import _known
from reprise.ops.dispatch import triton as pushed

TOKENS = (1, 4, 2)
TOP = 3
COUNT = 2
"""Experts of each rank."""
WIDTH = 12


def given(size: int, turn: int, tokens: int) -> list[tuple[torch.Tensor, ...]]:
    """Of each rank its rows, weights and numbers of experts; some rows have experts of few ranks,
    or none."""
    numbers = torch.Generator().manual_seed(1000 * turn + tokens)
    rng = random.Random(1000 * turn + tokens)
    found = []
    for _ in range(size):
        x = torch.randn(tokens, WIDTH, generator=numbers)
        x[0, 0] = -0.0
        weights = torch.rand(tokens, TOP, generator=numbers)
        ids = torch.full((tokens, TOP), -1, dtype=torch.int32)
        for row in ids:
            count = rng.randrange(TOP + 1)
            row[:count] = torch.tensor(rng.sample(range(size * COUNT), count), dtype=torch.int32)
        found.append((x, weights, ids))
    return found


def own_ids(ids: torch.Tensor, rank: int) -> torch.Tensor:
    own = ids - rank * COUNT
    return own.masked_fill((own < 0) | (own >= COUNT), -1)


def computed(x: torch.Tensor, weights: torch.Tensor, own: torch.Tensor, rank: int) -> torch.Tensor:
    """What the experts of a rank make of rows; 0 of those that have none there."""
    gains = torch.where(own >= 0, weights * (own + 2 + 10 * rank), 0.0).sum(1, keepdim=True)
    return torch.where((own >= 0).any(1, keepdim=True), x * gains, 0.0)


def main() -> None:
    rank, size, file = map(int, sys.argv[1:])
    group = Group("rows", rank, size)
    ranks = _known[group.name] = Communicator(group)
    ranks.symmetric = Shared(group, file)
    where = rank * COUNT, COUNT, COUNT
    for turn in range(4):
        for tokens in TOKENS:
            if turn % size == rank:
                time.sleep(0.05)  # one is late
            everyone = given(size, turn, tokens)
            x, weights, ids = everyone[rank]
            rows = torch.full((size * tokens, WIDTH), torch.nan)
            rows_weights = torch.empty(size * tokens, TOP)
            rows_ids = torch.empty(size * tokens, TOP, dtype=torch.int32)
            pushed.dispatch(x, weights, ids, *where, rows, rows_weights, rows_ids, group.name)
            expected = own_ids(torch.cat([each[2] for each in everyone]), rank)
            assert torch.equal(rows_ids, expected)
            assert torch.equal(rows_weights, torch.cat([each[1] for each in everyone]))
            wanted = (expected >= 0).any(1)
            assert torch.equal(rows[wanted], torch.cat([each[0] for each in everyone])[wanted])
            assert rows[~wanted].isnan().all()  # nobody has sent them
            given_back = computed(rows.nan_to_num(), rows_weights, rows_ids, rank)
            out = torch.empty_like(x)
            pushed.combine(given_back, rows_ids, ids, *where, out, group.name)
            total = torch.zeros_like(x)
            for each in range(size):
                total += computed(x, weights, own_ids(ids, each), each)
            assert torch.equal(out, total), (turn, tokens)
    assert int(ranks.symmetric.turns[0]) == 4 * 2 * len(TOKENS)


if __name__ == "__main__":
    main()
