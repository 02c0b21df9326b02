"""Gives requests the blocks they need, and shares blocks that hold the same prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from reprise.cache.block_pool import BlockPool
from reprise.cache.prefix import NO_PARENT, PrefixIndex, block_digest
from reprise.errors import ConfigError

_NO_EPOCH = -1


class CacheUser(Protocol):
    """What the manager reads and keeps on a request."""

    token_ids: list[int]
    skip_prefix_cache: bool
    cache_salt: bytes
    block_ids: list[int]
    block_digests: list[bytes]
    num_indexed_blocks: int
    cache_epoch: int


class CacheManager:
    """The one owner of the block pool and the prefix index.

    A request's way: ``match``, ``allocate`` with what matched, then ``allocate`` again whenever it
    outgrows its blocks and ``commit`` when tokens were computed, at last ``free``.

    Args:
        num_blocks: Blocks of the cache, the null block included.
        block_size: Tokens a block.
        enable_prefix_caching: Reuse computed blocks for requests that begin with the same tokens.

    Raises:
        ConfigError: Fewer than two blocks, or a block size below 1.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        if block_size < 1:
            raise ConfigError(f"block_size={block_size}: give at least 1")
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.index = PrefixIndex()
        self.pool = BlockPool(num_blocks, self.index)
        self.prefix_queries = 0
        """Tokens that were looked up in the prefix cache."""
        self.prefix_hits = 0
        """Tokens that were found there."""
        self._epoch = 0

    @property
    def capacity(self) -> int:
        """Tokens that a request alone can hold in the cache."""
        return (self.pool.num_blocks - 1) * self.block_size

    @property
    def usage(self) -> float:
        """Owned blocks as a fraction of all that requests can own."""
        return self.pool.num_used / (self.pool.num_blocks - 1)

    def match(self, request: CacheUser) -> list[int]:
        """The longest run of cached blocks that the request's known tokens begin with.

        At least one token stays uncovered, so that there is something to compute. Changes
        nothing: the blocks may be lost until ``allocate`` takes them.
        """
        blocks: list[int] = []
        if not self.enable_prefix_caching or request.skip_prefix_cache:
            return blocks
        for position in range((len(request.token_ids) - 1) // self.block_size):
            block = self.index.find(self._digest(request, position))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(
        self,
        request: CacheUser,
        num_tokens: int,
        cached: Sequence[int] = (),
        reserve: int = 0,
    ) -> bool:
        """Make the request's blocks hold its first ``num_tokens`` tokens: all of them or none.

        Args:
            request: Gets the blocks, appended to ``block_ids``.
            num_tokens: Tokens that must have a place, those that have one included.
            cached: What ``match`` returned, for a request that owns no blocks yet.
            reserve: Blocks that must stay free.

        Returns:
            False, with nothing changed, if too few blocks are free.
        """
        pool, owned = self.pool, request.block_ids
        wanted = -(-num_tokens // self.block_size) - len(owned) - len(cached)
        revived = sum(map(pool.is_free, cached))
        if wanted + revived + reserve > pool.num_free:
            return False
        if not owned:
            request.cache_epoch = self._epoch
            request.num_indexed_blocks = len(cached)
            pool.share(cached)  # first, lest they be handed out as free blocks
            owned.extend(cached)
        if wanted > 0:
            owned.extend(pool.allocate(wanted, after=owned[-1] if owned else None))
        return True

    def commit(self, request: CacheUser, num_tokens: int) -> None:
        """The first ``num_tokens`` tokens are computed and known: others may share full blocks."""
        num_full = num_tokens // self.block_size
        # Blocks computed before a reset, or on top of such, must not come back.
        if self.enable_prefix_caching and request.cache_epoch == self._epoch:
            for position in range(request.num_indexed_blocks, num_full):
                self.index.insert(self._digest(request, position), request.block_ids[position])
        request.num_indexed_blocks = max(num_full, request.num_indexed_blocks)

    def free(self, request: CacheUser) -> None:
        """Take all blocks from the request; its last ones are reused first."""
        self.pool.free(reversed(request.block_ids))
        # A new list: a scheduled step may still refer to the old one.
        request.block_ids = []
        request.num_indexed_blocks = 0

    def record_lookup(self, num_queried: int, num_found: int) -> None:
        """Count a lookup that led to an allocation; numbers of tokens."""
        self.prefix_queries += num_queried
        self.prefix_hits += num_found

    def reset_prefix_cache(self) -> None:
        """Forget all cached content, as after a change of weights. Running requests keep their
        blocks, but nobody will share them."""
        self.index.clear()
        self._epoch += 1

    def forget_blocks(self, blocks: Iterable[int]) -> None:
        """What these blocks hold is wrong: nobody may share them any more."""
        for block in blocks:
            self.index.evict(block)

    def never_share(self, request: CacheUser) -> None:
        """Do not offer the blocks that the request has now to others, whatever is computed yet."""
        request.cache_epoch = _NO_EPOCH

    def start_over(self) -> None:
        """Take back all blocks and forget what they hold, in whatever state an interruption left
        them."""
        self.index = PrefixIndex()
        self.pool = BlockPool(self.pool.num_blocks, self.index)
        self._epoch += 1

    def _digest(self, request: CacheUser, position: int) -> bytes:
        digests, size = request.block_digests, self.block_size
        while len(digests) <= position:
            begin = len(digests) * size
            parent = digests[-1] if digests else NO_PARENT
            tokens = request.token_ids[begin : begin + size]
            digests.append(block_digest(parent, tokens, request.cache_salt))
        return digests[position]
