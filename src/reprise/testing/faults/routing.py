"""Faults in what sends rows to experts and brings their results back."""

from __future__ import annotations

from typing import Any

import torch

from reprise.testing.faults.base import BrokenInGraphs, StaleArgument

TILE = 16
"""Rows of an expert that a product multiplies at once."""


class RoutingFault(BrokenInGraphs):
    """Of an op that multiplies rows ``x`` [T, D] with the experts ``ids`` [T, K] among those of
    ``gate_up`` [E, ...]."""

    needs = "experts"
    reads = frozenset({"x", "ids", "gate_up"})
    without = "the op has no experts"


class WrongExpert(RoutingFault):
    name = "wrong_expert"
    summary = "each row is sent to the experts beside its own"

    def broken(self, named: dict[str, Any]) -> Any:
        ids, count = named["ids"], len(named["gate_up"])
        return self.proceed({**named, "ids": torch.where(ids >= 0, (ids + 1) % count, ids)})


class StaleRouting(StaleArgument, RoutingFault):
    name = "stale_routing"
    summary = "rows are sent where those of the captured step were sent"
    argument = "ids"


class RowsBeyondTile(RoutingFault):
    name = "rows_beyond_tile"
    summary = f"of the rows that go to one expert those behind the first {TILE} are lost"
    shows_in = "mixed"

    def broken(self, named: dict[str, Any]) -> Any:
        ids = named["ids"]
        experts = torch.arange(len(named["gate_up"]), device=ids.device)
        mine = ids.flatten().unsqueeze(1) == experts
        before = mine.long().cumsum(0) - mine.long()
        lost = (mine & (before >= TILE)).any(dim=1).view(ids.shape)
        return self.proceed({**named, "ids": torch.where(lost, -1, ids)})


class SwappedRows(RoutingFault):
    name = "swapped_rows"
    summary = "two rows of an expert get each other's result"
    shows_in = "mixed"

    def broken(self, named: dict[str, Any]) -> Any:
        x, first = named["x"], named["ids"][:, 0]
        order = first.sort(stable=True).indices
        partners = order.clone()
        pairs = len(order) // 2
        left, right = order[: 2 * pairs : 2], order[1 : 2 * pairs : 2]
        same = first[left] == first[right]
        partners[: 2 * pairs : 2] = torch.where(same, right, left)
        partners[1 : 2 * pairs : 2] = torch.where(same, left, right)
        swapped = torch.empty_like(x)
        swapped[order] = x[partners]
        return self.proceed({**named, "x": swapped})
