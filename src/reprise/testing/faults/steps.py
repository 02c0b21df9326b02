"""Faults that give wrong results in steps of one kind, or of one value, and in no others."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from reprise.ops.registry import Op, OpTable
from reprise.platforms import Platform
from reprise.testing.faults.planted import (
    PlantedFault,
    last_slots,
    request_of_token,
    tokens_of,
    used_blocks,
)


class WrongWhere(PlantedFault):
    """What the op hands on has the wrong sign in some rows."""

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        handed_on = named["out"] if result is None else result
        wrong = self.where(named).expand(len(handed_on)) & self.active
        sign = torch.where(wrong, -1.0, 1.0).to(handed_on.dtype).view(-1, 1, 1)
        if result is None:
            handed_on.mul_(sign)
            return None
        return handed_on * sign

    @abstractmethod
    def where(self, named: dict[str, Any]) -> Tensor:
        """[T] bool, or a scalar for all rows."""


class _WrongRequests(WrongWhere):
    """By what only attention is told."""

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if op.name != "paged_attention":
            return "the op is not told of requests and their blocks"
        return super().inexpressible(op, executor, platform)


class WrongNeighbours(_WrongRequests):
    name = "wrong_neighbours"
    summary = "requests whose blocks are neighbours in the cache are wrong"

    def where(self, named: dict[str, Any]) -> Tensor:
        tables = named["block_tables"]
        follows = (tables[:, 1:] == tables[:, :-1] + 1) & used_blocks(named)[:, 1:]
        return follows.any(dim=1)[request_of_token(named)]


class WrongFreshPrompt(WrongWhere):
    name = "wrong_fresh_prompt"
    summary = "fresh prompts of 18 tokens and more are wrong"
    shows_in = "mixed"

    def where(self, named: dict[str, Any]) -> Tensor:
        tokens = tokens_of(named)
        return (tokens.begin == 0) & (tokens.new >= 18)


class WrongLargeRequest(_WrongRequests):
    name = "wrong_large_request"
    summary = "steps are wrong in which one request brings most of the bucket's tokens"
    shows_in = "mixed"

    def where(self, named: dict[str, Any]) -> Tensor:
        tokens = tokens_of(named)
        return 2 * torch.where(tokens.live, tokens.new, 0).amax() > max(2, len(tokens.new))


class WrongPrefixHit(_WrongRequests):
    name = "wrong_prefix_hit"
    summary = "a chunk behind a prefix hit is wrong if it is alone in its step"
    shows_in = "mixed"

    def where(self, named: dict[str, Any]) -> Tensor:
        tokens, size = tokens_of(named), named["key_cache"].shape[1]
        alone = tokens.live.sum() == torch.where(tokens.live, tokens.new, 0).amax()
        behind = (tokens.begin > 0) & (tokens.begin % size == 0) & (tokens.new > 1)
        return alone & behind


class WrongThreeOfFour(WrongWhere):
    name = "wrong_three_of_four"
    summary = "steps of three requests, padded to four, are wrong"

    def where(self, named: dict[str, Any]) -> Tensor:
        live = tokens_of(named).live
        return (live.sum() == 3) & torch.full_like(live, len(live) == 4)


class WrongUpperHalf(WrongWhere):
    name = "wrong_upper_half"
    summary = "rows are wrong that are written to the upper half of the cache"

    def where(self, named: dict[str, Any]) -> Tensor:
        blocks, size = named["key_cache"].shape[:2]
        upper = last_slots(named) >= (blocks + 1) // 2 * size
        return upper if "slot_mapping" in named else upper[request_of_token(named)]


class WrongPadded(WrongWhere):
    name = "wrong_padded"
    summary = "any row of padding makes all rows of the step wrong"

    def where(self, named: dict[str, Any]) -> Tensor:
        return ~tokens_of(named).live.all()


class WrongValues(WrongWhere):
    name = "wrong_values"
    summary = "a row in a dozen or so is wrong, by its values alone"
    caught = "canary:1"

    def where(self, named: dict[str, Any]) -> Tensor:
        values = named[self.activation(named)].flatten(1)[:, 0].float()
        return (values * 1000).abs().long() % 13 == 5


class WrongPositions(WrongWhere):
    name = "wrong_positions"
    summary = "a request is wrong in the step that computes one certain position of it"
    caught = "canary:1"
    position = 45

    def where(self, named: dict[str, Any]) -> Tensor:
        tokens = tokens_of(named)
        within = self.position - tokens.begin
        return (within >= 0) & (within < tokens.new)


class WrongBesideDecodes(_WrongRequests):
    name = "wrong_beside_decodes"
    summary = "steps are wrong in which some requests decode beside chunks of others"
    shows_in = "mixed"

    def where(self, named: dict[str, Any]) -> Tensor:
        tokens = tokens_of(named)
        single = (tokens.live & (tokens.new == 1) & (tokens.begin > 0)).any()
        return single & (tokens.live & (tokens.new > 1)).any()


class WrongDrafts(WrongWhere):
    name = "wrong_drafts"
    summary = "of a few new tokens behind others, as drafts are, all but the first are wrong"
    shows_in = "mixed"

    def where(self, named: dict[str, Any]) -> Tensor:
        tokens = tokens_of(named)
        return (tokens.begin > 0) & (tokens.new <= 8) & (tokens.offset > 0)


class WrongEverySecond(WrongWhere):
    name = "wrong_every_second"
    summary = "every second replay is wrong, by a counter in memory of its own"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.count = torch.zeros((), dtype=torch.int64, device=table.platform.device)

    def where(self, named: dict[str, Any]) -> Tensor:
        if not self.is_last(named):
            return torch.zeros_like(self.active)
        self.count.add_(self.active)
        return self.count % 2 == 0
