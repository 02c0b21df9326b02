"""Whole experts over data and tensor ranks: for its own rows each rank gets what one rank with all
experts gives."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from reprise.distributed import ALONE, Communicator, Group, own_experts
from reprise.distributed.communicator import _known
from reprise.layers import Build, Experts

EXPERTS, TOP, HIDDEN, INNER = 12, 3, 16, 8
SECONDS = 60.0
"""For a thread to come to a collective."""


class Threads(Communicator):
    """Ranks that are threads.

    Args:
        group: Of one of them; its name is its own.
        places: Where each of them puts what it has.
        barrier: They meet here.
    """

    def __init__(self, group: Group, places: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__(group)
        self._places, self._barrier = places, barrier

    def _all(self, x: Tensor) -> list[Tensor]:
        self._barrier.wait(SECONDS)
        self._places[self.group.rank] = x
        self._barrier.wait(SECONDS)
        return list(self._places)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        found = torch.stack(self._all(x))
        return found if out is None else out.copy_(found.view(out.shape))

    def reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        parts = [each.view(self.group.size, *out.shape) for each in self._all(x.clone())]
        out.copy_(torch.stack([each[self.group.rank] for each in parts]).sum(0))


def experts(device: str, group: Group, exchange: Group | None) -> Experts:
    build = Build(torch.float32, torch.device(device), 16, group=group, exchange=exchange)
    return Experts(build, EXPERTS, HIDDEN, INNER)


@pytest.mark.parametrize(("data", "tensor"), [(1, 3), (2, 1), (3, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("rows", [1, 7])
def test_rows_get_what_all_experts_give(device: str, data: int, tensor: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    whole = experts(device, ALONE, None)
    for each in whole.parameters():
        each.copy_(numbers(*each.shape))
    x = numbers(data, rows, HIDDEN)
    weights = numbers(data, rows, TOP).abs()
    order = torch.rand(data, rows, EXPERTS, generator=generator).argsort(-1)
    ids = order[..., :TOP].int().to(device)
    ids[-1, rows // 2 :] = -1  # padding of one that has less to do
    expected = torch.stack([whole(*each) for each in zip(x, weights, ids, strict=True)])
    places = [[x] * data for _ in range(tensor)]
    barriers = [threading.Barrier(data) for _ in range(tensor)]

    def compute(ranks: tuple[int, int]) -> Tensor:
        row, column = ranks
        exchange = Group(f"test data {row} {column}", row, data)
        _known[exchange.name] = Threads(exchange, places[column], barriers[column])
        try:
            group = Group("test tensor", column, tensor)
            own = own_experts(group, exchange, EXPERTS)
            mine = experts(device, group, exchange)
            for part, all_parts in zip(mine.parameters(), whole.parameters(), strict=True):
                part.copy_(all_parts[own.begin : own.begin + own.size])
            return mine(x[row], weights[row], ids[row])
        finally:
            del _known[exchange.name]

    every = list(itertools.product(range(data), range(tensor)))
    with ThreadPoolExecutor(len(every)) as pool:
        partial = torch.stack(list(pool.map(compute, every)))
    # The layer gives a part of the sum over the tensor ranks.
    found = partial.view(data, tensor, rows, HIDDEN).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert not found[-1, rows // 2 :].any(), "padding is nobody's"
