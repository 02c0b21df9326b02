"""Faults that leave the step's results alone and spoil memory: one for each class of it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from reprise.ops.registry import Op, OpTable
from reprise.platforms import Platform
from reprise.testing.faults.planted import PlantedFault, last_slots, live_slots


class CacheOverrun(PlantedFault):
    name = "cache_overrun"
    summary = "a write that fills a block goes one slot further, into another request's block"
    traced = False

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        slots, size = last_slots(named), named["key_cache"].shape[1]
        last = named["key_cache"].shape[0] * size - 1
        fills = self.active & (slots % size == size - 1) & (slots >= size)
        targets = torch.where(fills, slots + 1, slots).clamp(max=last)
        for name in ("key_cache", "value_cache"):
            rows = named[name].flatten(0, 1)
            rows[targets] = rows[slots]
        return result


class PaddingWritesLive(PlantedFault):
    name = "padding_writes_live"
    summary = "padding rows are written to a block of a request instead of the null block"
    traced = False

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        size = named["key_cache"].shape[1]
        if "slot_mapping" in named:
            padding = ~live_slots(named).all()
            target = named["slot_mapping"][:1] // size * size
        else:
            padding = (named["seq_lens"] == 0).any()
            padding = padding | (named["query_start_loc"][-1] < len(named["query"]))
            target = named["block_tables"][:1, 0].long() * size
        for name in ("key_cache", "value_cache"):
            rows = named[name].flatten(0, 1)
            # In float32: eight-bit numbers cannot be added.
            more = torch.where(self.active & padding, rows[:1].float() + 1, 0)
            rows[target] = (rows[target].float() + more).to(rows.dtype)
        return result


class _ChangedInput(PlantedFault):
    traced = False

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        if self.is_last(named):
            tensor = self.input(named)
            tensor.copy_(torch.where(self.active, self.changed(tensor), tensor))
        return result

    @abstractmethod
    def input(self, named: dict[str, Any]) -> Tensor: ...

    def changed(self, tensor: Tensor) -> Tensor:
        return (tensor - 1).clamp(min=0)


class ChangedTables(_ChangedInput):
    name = "changed_tables"
    summary = "the graph uses the memory of block tables or slots again behind their last use"

    def input(self, named: dict[str, Any]) -> Tensor:
        found: Tensor = named["block_tables" if "block_tables" in named else "slot_mapping"]
        return found


class ChangedLengths(_ChangedInput):
    name = "changed_lengths"
    summary = "the graph uses the memory of lengths or positions again behind their last use"

    def input(self, named: dict[str, Any]) -> Tensor:
        return self.extent(named)


class ChangedWeight(PlantedFault):
    name = "changed_weight"
    summary = "the graph writes into a weight behind its last use"
    traced = False

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if op.name != "rotary_cache":
            return "the op is given no weights"
        return super().inexpressible(op, executor, platform)

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        weight = named["query_norm"]
        if weight is None:
            weight = named["cos_sin"]
            if not self.is_last(named):
                return result
        weight.mul_(torch.where(self.active, 1.0625, 1.0).to(weight.dtype))
        return result


class ChangedBeside(PlantedFault):
    name = "changed_beside"
    summary = "the graph's scratch overlaps memory of others, such as the sampler's counts"
    caught = "canary:1"
    traced = False

    elements = 4096
    """Of the victim."""

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        device = table.platform.device
        self.victim = torch.zeros(self.elements, dtype=torch.int32, device=device)
        self.beside = {"a fault's victim": self.victim}

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        if self.is_last(named):
            places = torch.arange(self.elements, device=self.victim.device)
            hit = places % 7 == self.extent(named).sum() % 7
            self.victim.add_(hit & self.active)
        return result
