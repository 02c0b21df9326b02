"""Whole experts over data and tensor ranks: for its own rows each rank gets what one rank with all
experts gives."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from reprise import platforms
from reprise.distributed import ALONE, Communicator, Group, own_experts
from reprise.distributed.communicator import _known
from reprise.layers import Build, Experts
from reprise.ops import OpTable

T = TypeVar("T")

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

    def __init__(self, group: Group, places: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(group)
        self._places, self._barrier = places, barrier
        self.rows_sent: list[int] = []
        """Of each exchange of parts that differ."""

    def _all(self, x: T) -> list[T]:
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

    def all_to_all(
        self,
        x: Tensor,
        out: Tensor,
        sent: Sequence[int] | None = None,
        received: Sequence[int] | None = None,
    ) -> None:
        size, rank = self.group.size, self.group.rank
        for_each = [len(x) // size] * size if sent is None else list(sent)
        mine = [
            each[sum(counts[:rank]) : sum(counts[: rank + 1])]
            for each, counts in zip(self._all(x.clone()), self._all(for_each), strict=True)
        ]
        if received is not None:
            assert [len(each) for each in mine] == list(received)
            self.rows_sent.append(len(x))
        out.copy_(torch.cat(mine))


def experts(device: str, group: Group, exchange: Group | None) -> Experts:
    build = Build(torch.float32, torch.device(device), 16, group=group, exchange=exchange)
    return Experts(build, EXPERTS, HIDDEN, INNER)


@pytest.mark.parametrize(("data", "tensor"), [(1, 3), (2, 1), (3, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("rows", [1, 7])
def test_rows_get_what_all_experts_give(device: str, data: int, tensor: int, rows: int) -> None:
    """However they travel; and bit by bit the same, unless the backend sums as it likes."""
    found = {name: rows_of(device, data, tensor, rows, chosen) for name, chosen in TRAVELS.items()}
    for name, each in found.items():
        if name == "reduce_scatter":
            torch.testing.assert_close(each, found["gather"], rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(each, found["gather"]), name


TRAVELS: dict[str, dict[str, str]] = {
    "gather": {},
    "reduce_scatter": {"combine": "reduce_scatter"},
    "all_to_all": {"dispatch": "all_to_all", "combine": "all_to_all"},
    "there": {"dispatch": "all_to_all"},
    "back": {"combine": "all_to_all"},
}


def rows_of(device: str, data: int, tensor: int, rows: int, chosen: dict[str, str]) -> Tensor:
    """What the ranks of each replica give together, compared with one rank."""
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
        ranks = _known[exchange.name] = Threads(exchange, places[column], barriers[column])
        table = OpTable(platforms.resolve(device), chosen)
        try:
            group = Group("test tensor", column, tensor)
            own = own_experts(group, exchange, EXPERTS)
            mine = experts(device, group, exchange)
            for part, all_parts in zip(mine.parameters(), whole.parameters(), strict=True):
                part.copy_(all_parts[own.begin : own.begin + own.size])
            with torch.inference_mode(), table.computing():
                given = mine(x[row], weights[row], ids[row])
            if chosen.get("dispatch") == "all_to_all" and data > 1:
                per_rank = EXPERTS // (data * tensor)
                there = ids[row] // per_rank  # ranks of all replicas, by their numbers of experts
                wanted = ((there % tensor == column) & (ids[row] >= 0)).long()
                owners = torch.where(wanted > 0, there // tensor, data)
                pairs = torch.zeros(rows, data + 1).scatter_(1, owners.cpu().long(), 1.0)
                assert ranks.rows_sent[0] == int(pairs[:, :data].sum())
            return given
        finally:
            del _known[exchange.name]

    every = list(itertools.product(range(data), range(tensor)))
    with ThreadPoolExecutor(len(every)) as pool:
        partial = torch.stack(list(pool.map(compute, every)))
    # The layer gives a part of the sum over the tensor ranks.
    found = partial.view(data, tensor, rows, HIDDEN).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert not found[-1, rows // 2 :].any(), "padding is nobody's"
    return found
