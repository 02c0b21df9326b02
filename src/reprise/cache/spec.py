"""What a layer keeps from step to step, and for how long: the layer says it once, all others read
it here."""

from __future__ import annotations

import math
import sys
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
    scales_of: str | None = None
    """The rows whose eight-bit codes these are the scales of: one for each entry but those of their
    last dimension. A block of scales has its tokens last, since a kernel reads those of many tokens
    for one head."""
    together: int = 1
    """How many of the last dimensions are of one scale: what rounding does to a number is in
    proportion to the largest of them, however small the number itself came out."""

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


NEVER = sys.maxsize


class Lifetime(Protocol):
    """How long the rows of a cache are needed. Hashable, and equal by value: the caches of one
    lifetime share one block table."""

    @property
    def bounded(self) -> bool:
        """However long a request is, it owns no more than so many blocks."""

    @property
    def rewritten(self) -> bool:
        """A request has one row, its state, which every step of it replaces: a block is that row.
        What the state was behind some token is known if it was copied then; such checkpoints lie
        at multiples of the block size."""

    @property
    def apart(self) -> int:
        """Of a state: tokens between places where it is copied while a request goes on, and of the
        shortest prefix that is worth a copy, which may end at any block; else 1."""

    def block_size(self, preferred: int, every: int) -> int:
        """Tokens that a block spans.

        Args:
            preferred: As the options or the platform say; a power of two.
            every: The most tokens that a row of these caches stands for.
        """

    def needed(self, begin: int, end: int, block_size: int) -> range:
        """Which blocks of a request must exist to compute its tokens ``begin`` to ``end - 1``."""

    def leaves(self, block: int, block_size: int) -> int:
        """The number of computed tokens from which on the block is not needed any more;
        :data:`NEVER`: its request needs it as long as it runs."""

    def most(self, length: int, block_size: int, ahead: int) -> int:
        """Blocks that a request of at most ``length`` tokens may own at once, while it decodes and
        at most ``ahead`` tokens are scheduled behind those that are computed."""

    def lasting(self, length: float) -> float:
        """Of a request's first ``length`` tokens, how many have rows that a later one needs."""

    def resumes(self, length: int, block_size: int) -> range:
        """Which blocks let a request go on behind its first ``length`` tokens, a multiple of
        ``block_size``, without having computed them."""


@dataclass(frozen=True)
class Kept:
    """A row is needed as long as its request runs."""

    bounded = False
    rewritten = False
    apart = 1

    def block_size(self, preferred: int, every: int) -> int:
        return max(preferred, every)

    def needed(self, begin: int, end: int, block_size: int) -> range:
        return range(-(-end // block_size))

    def leaves(self, block: int, block_size: int) -> int:
        return NEVER

    def most(self, length: int, block_size: int, ahead: int) -> int:
        return -(-length // block_size)

    def lasting(self, length: float) -> float:
        return length

    def resumes(self, length: int, block_size: int) -> range:
        return range(length // block_size)

    def __str__(self) -> str:
        return "kept"


KEPT = Kept()

SMALLEST_WINDOW_BLOCK = 8


@dataclass(frozen=True)
class Window:
    """A token needs the rows of the last ``size`` tokens, its own included."""

    size: int

    bounded = True
    rewritten = False
    apart = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ModelError(f"a window of {self.size} tokens: give at least 1")

    def block_size(self, preferred: int, every: int) -> int:
        # A request owns a block more than its window fills: a large one would be a waste.
        largest = 1 << (max(SMALLEST_WINDOW_BLOCK, self.size // 4).bit_length() - 1)
        return max(min(preferred, largest), every)

    def needed(self, begin: int, end: int, block_size: int) -> range:
        return range(max(0, begin - self.size + 1) // block_size, -(-end // block_size))

    def resumes(self, length: int, block_size: int) -> range:
        return range(max(0, length - self.size + 1) // block_size, length // block_size)

    def leaves(self, block: int, block_size: int) -> int:
        return (block + 1) * block_size + self.size - 1

    def most(self, length: int, block_size: int, ahead: int) -> int:
        return min(-(-length // block_size), -(-(self.size - 2 + ahead) // block_size) + 1)

    def lasting(self, length: float) -> float:
        return min(length, self.size)

    def __str__(self) -> str:
        return f"window of {self.size}"


CHECKPOINT_TOKENS = 64
"""States of linear attention are made in chunks of so many tokens."""


@dataclass(frozen=True)
class State:
    """A request has one row, which each of its steps replaces."""

    checkpoint_tokens: int = CHECKPOINT_TOKENS
    """See :attr:`Lifetime.apart`."""
    rows: int = 1
    """2: a request has another row, for what begins with its state and is not kept: drafts go on
    from a copy."""

    bounded = True
    rewritten = True

    @property
    def apart(self) -> int:
        return self.checkpoint_tokens

    def block_size(self, preferred: int, every: int) -> int:
        return min(preferred, self.checkpoint_tokens)

    def needed(self, begin: int, end: int, block_size: int) -> range:
        return range(self.rows)

    def resumes(self, length: int, block_size: int) -> range:
        return range(length // block_size - 1, length // block_size)

    def leaves(self, block: int, block_size: int) -> int:
        return NEVER

    def most(self, length: int, block_size: int, ahead: int) -> int:
        return self.rows

    def lasting(self, length: float) -> float:
        return 1

    def __str__(self) -> str:
        return "state" if self.rows == 1 else "state and a copy"


STATE = State()


class LayerCache:
    """The caches of one layer, tensors by name, that live equally long.

    A pass over a token writes its row of each whole, before anything of the pass reads it and
    whatever is there; but for states, and rows that stand for several tokens.

    A layer has it as an attribute, under any name, and may have several of other lifetimes.

    Args:
        lifetime: How long a row is needed.
        drafts: Of a state: from how many drafted tokens at most the layer can take back those that
            do not count (:attr:`Batch.accepted`). Rows of tokens need no care: the next step
            overwrites them.
        rows: The tensors, by the names that the layer calls them.
    """

    def __init__(self, lifetime: Lifetime, drafts: int = 0, /, **rows: Rows) -> None:
        for name, each in rows.items():
            if each.every < 1 or each.every & (each.every - 1):
                raise ModelError(f"cache {name}: every={each.every} must be a power of two")
            if lifetime.rewritten and each.every > 1:
                raise ModelError(f"cache {name}: every={each.every} of a state, which is one row")
            if not 1 <= each.together <= max(1, len(each.shape)):
                raise ModelError(
                    f"cache {name}: together={each.together} of rows of shape {each.shape}: give "
                    "1 to the number of its dimensions"
                )
            codes = rows.get(each.scales_of or "")
            if each.scales_of and (
                codes is None or (codes.shape[:-1], codes.every) != (each.shape, each.every)
            ):
                raise ModelError(
                    f"cache {name}: no scales of {each.scales_of} are of shape {each.shape}"
                )
        self.lifetime, self.drafts = lifetime, drafts
        self.rows: Mapping[str, Rows] = rows
        self.table = 0
        """Which of :attr:`Batch.tables` says where a token's rows are."""
        self.tensors: dict[str, Tensor] = {}
        """[N, block_size // every, *shape] each, of N blocks ([N, *shape, block_size // every] of
        scales), or [N, *shape] of N states; empty until it is bound."""

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
        return sum(math.prod(self.shape(each, block_size)) * each.dtype.itemsize
                   for each in self.rows.values())  # fmt: skip

    def shape(self, rows: Rows, block_size: int) -> tuple[int, ...]:
        """The shape of a block of so many tokens."""
        if self.lifetime.rewritten:
            return rows.shape
        if rows.scales_of is not None:
            return (*rows.shape, block_size // rows.every)
        return (block_size // rows.every, *rows.shape)


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
