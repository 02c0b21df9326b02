"""Faults that are work in the graph: what they do depends on the step, and is decided by the
device."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reprise.ops.registry import Op, OpTable
from reprise.platforms import Platform
from reprise.platforms.device_graph import capturing
from reprise.testing.faults.base import Fault

_TOLD = (
    {"positions", "slot_mapping", "key_cache", "value_cache"},
    {"query", "query_start_loc", "seq_lens", "block_tables", "key_cache", "value_cache"},
)
"""Arguments from which the requests of a step can be told."""


def knows_requests(op: Op) -> bool:
    """Whether the op's arguments tell the requests of a step and their place in a cache."""
    return op.extent is not None and any(each <= set(op.arguments) for each in _TOLD)


class PlantedFault(Fault):
    """The op's real work, and then harm while :attr:`active` is set."""

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.active = torch.ones((), dtype=torch.bool, device=table.platform.device)
        """On the device and read by each replay: a graph can be sound at first and go bad."""
        self._latest: int | None = None

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if not knows_requests(op):
            return "the op knows nothing of requests"
        return super().inexpressible(op, executor, platform)

    def run(self, named: dict[str, Any]) -> Any:
        result = self.proceed(named)
        if capturing():
            return self.harm(named, result)
        self._latest = named["key_cache"].data_ptr()
        return result

    @abstractmethod
    def harm(self, named: dict[str, Any], result: Any) -> Any:
        """Do it, by device work alone, and return what the op is to return.

        Args:
            named: The op's arguments.
            result: What the op's real work returned.
        """

    def extent(self, named: dict[str, Any]) -> Tensor:
        """How far the op reaches into each request, or where each of its tokens stands."""
        assert self.op.extent is not None
        found: Tensor = named[self.op.extent]
        return found

    def is_last(self, named: dict[str, Any]) -> bool:
        """Whether this is the step's last call of the op: captures follow an eager pass."""
        return bool(named["key_cache"].data_ptr() == self._latest)


@dataclass(frozen=True)
class Tokens:
    """Of each token of a step, [T], what an op can find out."""

    new: Tensor
    """int64, new tokens of its request."""
    begin: Tensor
    """int64, position of the first of them."""
    offset: Tensor
    """int64, how many of them come before it."""
    live: Tensor
    """bool, false for padding."""


def tokens_of(named: dict[str, Any]) -> Tokens:
    """What the arguments of an op that knows of requests say of the step's tokens."""
    if "positions" in named:
        return _tokens_of_positions(named["positions"], live_slots(named))
    starts, lengths = named["query_start_loc"].long(), named["seq_lens"].long()
    places = torch.arange(len(named["query"]), device=starts.device)
    rows = request_of_token(named)
    new = (starts[1:] - starts[:-1])[rows]
    return Tokens(new, lengths[rows] - new, places - starts[rows], places < starts[-1])


def _tokens_of_positions(positions: Tensor, live: Tensor) -> Tokens:
    """Consecutive positions are taken for one request, which two short ones may have too."""
    places = torch.arange(len(positions), device=positions.device)
    first = (positions != positions.roll(1) + 1) | (places == 0)
    request = first.long().cumsum(0) - 1
    new = torch.zeros_like(positions).index_add(0, request, live.long())[request]
    since = places - torch.where(first, places, 0).cummax(0).values
    return Tokens(new, positions - since, since, live)


def request_of_token(named: dict[str, Any]) -> Tensor:
    """[T] int64, from the arguments of ``paged_attention``; any request for padding."""
    ends = named["query_start_loc"][1:].contiguous()
    places = torch.arange(len(named["query"]), device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, places, right=True).clamp(max=len(ends) - 1)


def live_slots(named: dict[str, Any]) -> Tensor:
    """[T] bool, from the arguments of ``rotary_cache``: padding is written to block 0."""
    return named["slot_mapping"] >= named["key_cache"].shape[1]


def used_blocks(named: dict[str, Any]) -> Tensor:
    """[R, M] bool, from the arguments of ``paged_attention``: entries of block tables in use."""
    tables, size = named["block_tables"], named["key_cache"].shape[1]
    columns = torch.arange(tables.shape[1], device=tables.device)
    return columns * size < named["seq_lens"].unsqueeze(1)


def last_slots(named: dict[str, Any]) -> Tensor:
    """Slots that the step writes, int64: of each token (``rotary_cache``), or of the last one of
    each request (``paged_attention``); in block 0 for padding."""
    if "slot_mapping" in named:
        return named["slot_mapping"]
    size, lengths = named["key_cache"].shape[1], named["seq_lens"].long()
    last = (lengths - 1).clamp(min=0)
    blocks = named["block_tables"].long().gather(1, (last // size).unsqueeze(1)).squeeze(1)
    return torch.where(lengths > 0, blocks * size + last % size, 0)
