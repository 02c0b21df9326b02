"""What a layer keeps from step to step, and for how long: the layer says it once, all others read
it here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from reprise.errors import ModelError


@dataclass(frozen=True)
class Rows:
    """One tensor of a cache."""

    shape: tuple[int, ...]
    """Of a row."""
    dtype: torch.dtype
    every: int = 1
    """Tokens that one row stands for, such as 4 where keys are compressed; a power of two."""

    @property
    def nbytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Lifetime(Protocol):
    """How long the rows of a cache are needed. Hashable, and equal by value: the caches of one
    lifetime share one block table."""

    def block_size(self, preferred: int, every: int) -> int:
        """Tokens that a block spans.

        Args:
            preferred: As the options or the platform say; a power of two.
            every: The most tokens that a row of these caches stands for.
        """

    def needed(self, begin: int, end: int, block_size: int) -> range:
        """Which blocks of a request must exist to compute its tokens ``begin`` to ``end - 1``."""

    def lasting(self, length: float) -> float:
        """Of a request's first ``length`` tokens, how many have rows that a later one needs."""

    def resumes(self, length: int, block_size: int) -> range:
        """Which blocks let a request go on behind its first ``length`` tokens, a multiple of
        ``block_size``, without having computed them."""


@dataclass(frozen=True)
class Kept:
    """A row is needed as long as its request runs."""

    def block_size(self, preferred: int, every: int) -> int:
        return max(preferred, every)

    def needed(self, begin: int, end: int, block_size: int) -> range:
        return range(-(-end // block_size))

    def lasting(self, length: float) -> float:
        return length

    def resumes(self, length: int, block_size: int) -> range:
        return range(length // block_size)

    def __str__(self) -> str:
        return "kept"


KEPT = Kept()


class LayerCache:
    """The caches of one layer, tensors by name, that live equally long.

    A layer has it as an attribute, under any name, and may have several of other lifetimes.

    Args:
        lifetime: How long a row is needed.
        rows: The tensors, by the names that the layer calls them.
    """

    def __init__(self, lifetime: Lifetime, **rows: Rows) -> None:
        for name, each in rows.items():
            if each.every < 1 or each.every & (each.every - 1):
                raise ModelError(f"cache {name}: every={each.every} must be a power of two")
        self.lifetime = lifetime
        self.rows: Mapping[str, Rows] = rows
        self.table = 0
        """Which of :attr:`Batch.tables` says where a token's rows are."""
        self.tensors: dict[str, Tensor] = {}
        """[N, block_size // every, *shape] each, of N blocks; empty until it is bound."""

    def bind(self, table: int, tensors: Mapping[str, Tensor]) -> None:
        """Use these tensors from the next step on."""
        self.table = table
        self.tensors = dict(tensors)

    @property
    def token_bytes(self) -> float:
        """Bytes of the rows of one token."""
        return sum(each.nbytes / each.every for each in self.rows.values())

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a block of so many tokens."""
        return sum(block_size // each.every * each.nbytes for each in self.rows.values())


def caches_of(model: nn.Module) -> dict[str, LayerCache]:
    """The caches of all layers of a model, by names for people: ``layer 3``, or where a layer has
    several, ``layer 3 window``."""
    found: dict[str, LayerCache] = {}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, LayerCache):
                number = next((part for part in path.split(".") if part.isdigit()), None)
                name = f"layer {number}" if attribute == "cache" else f"layer {number} {attribute}"
                if number is None or name in found:
                    name = f"{path}.{attribute}"
                found[name] = value
    return found
