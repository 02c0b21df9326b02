"""What is kept on a request for its caches, and what all of its tables have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from reprise.cache.block_pool import NULL_BLOCK, BlockPool
from reprise.cache.layout import TableLayout
from reprise.cache.prefix import NO_PARENT, PrefixIndex, block_digest


class CacheUser(Protocol):
    """What is read and kept on a request. Lists have an entry for each table."""

    token_ids: list[int]
    skip_prefix_cache: bool
    cache_salt: bytes
    max_total_tokens: int
    tables: list[list[int]]
    num_left: list[int]
    num_indexed: list[int]
    num_places: int
    commit_at: int
    checkpoints: list[Checkpoint]
    state_begin: int
    replay: int
    junction: int
    block_digests: list[bytes]
    cache_epoch: int


@dataclass(eq=False)
class Checkpoint:
    """A copy of a request's state, not yet offered to others."""

    table: RequestTable
    length: int
    """Tokens behind which the state was this."""
    slot: int
    replay: int = 0
    """How many of these tokens, the last ones, are kept beside the state and are not in it."""
    certain: bool = True
    """Else some of those are drafts that may not count, which the next update tells."""
    sound: bool | None = None
    """The copy is of numbers; None: that is not known yet."""


@dataclass(frozen=True)
class Copy:
    """A state to be copied before a step is computed."""

    table: int
    source: int
    target: int


class RequestTable:
    """One block table of every request.

    Args:
        number: Which.
        layout: Its lifetime and block size.
        pool: Where its blocks are from.
        index: Finds blocks of this pool.
        grain: Digests are of so many tokens.
    """

    def __init__(
        self, number: int, layout: TableLayout, pool: BlockPool, index: PrefixIndex, grain: int
    ) -> None:
        self.number = number
        self.lifetime, self.size = layout.lifetime, layout.block_size
        self.bounded = layout.lifetime.bounded
        self._layout = layout
        self.pool, self.index = pool, index
        self._grain = grain
        self._tag = bytes([number])

    def key(self, request: CacheUser, length: int) -> bytes:
        """Identifies what the block holds that ends behind the request's first ``length`` tokens:
        these tokens, and what table it is of."""
        digests, grain = request.block_digests, self._grain
        while len(digests) * grain < length:
            begin = len(digests) * grain
            parent = digests[-1] if digests else NO_PARENT
            tokens = request.token_ids[begin : begin + grain]
            digests.append(block_digest(parent, tokens, request.cache_salt))
        return digests[length // grain - 1] + self._tag

    def find(self, request: CacheUser, length: int) -> tuple[list[int], list[int]]:
        """The blocks that end within the first ``length`` tokens, the null block where there is
        none, and for each how many there are in a row up to it. Ends early where no prefix can go
        on."""
        blocks: list[int] = []
        runs: list[int] = []
        if not length:
            return blocks, runs
        needs_all = self.resumes(length).start == 0 and not self.lifetime.rewritten
        run = 0
        for end in range(self.size, length + 1, self.size):
            block = self.index.find(self.key(request, end))
            if block is None and needs_all:
                break
            run = 0 if block is None else run + 1
            blocks.append(NULL_BLOCK if block is None else block)
            runs.append(run)
        return blocks, runs

    def resumes(self, length: int) -> range:
        return self.lifetime.resumes(length, self.size)
