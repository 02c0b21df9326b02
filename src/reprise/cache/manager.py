"""Gives requests the blocks they need, and shares blocks that hold the same prefix."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from reprise.cache.block_pool import NULL_BLOCK, BlockPool
from reprise.cache.block_table import BlockTable
from reprise.cache.checkpoints import Checkpoints
from reprise.cache.hits import Hit, longest_hit
from reprise.cache.layout import CacheLayout
from reprise.cache.prefix import PrefixIndex
from reprise.cache.request_table import CacheUser
from reprise.cache.spec import NEVER
from reprise.cache.state_table import StateTable
from reprise.errors import ConfigError

_NO_EPOCH = -1
_NOT_VERIFIED = -1
LARGEST_RESERVE = 1 / 4
"""Of a pool, what an admission may have to leave for others at most."""


class CacheManager:
    """The one owner of the block pools and of the prefix indices.

    A request's way: ``match``, ``admit`` with what matched, then ``grow`` before tokens are
    computed and ``commit`` when they were, at last ``free``.

    A request whose blocks are bounded has a claim to as many as it may own between two steps, from
    its admission on, so that it never waits for others half-way. What it owns beyond that, because
    a step computes many of its tokens, and what tables that grow with their requests take, comes
    from the blocks that are not reserved by a claim.

    Args:
        layout: Tables and pools.
        enable_prefix_caching: Reuse computed blocks for requests that begin with the same tokens.

    Raises:
        ConfigError: A pool of fewer than two blocks, or a block size below 1.
    """

    def __init__(self, layout: CacheLayout, enable_prefix_caching: bool) -> None:
        for each in layout.tables:
            if each.block_size < 1:
                raise ConfigError(f"block_size={each.block_size}: give at least 1")
        self.layout = layout
        self.enable_prefix_caching = enable_prefix_caching
        self.capacity = layout.capacity
        """Tokens that a request alone can hold in the cache."""
        self.prefix_queries = 0
        """Tokens that were looked up in the prefix cache."""
        self.prefix_hits = 0
        """Tokens that were found there."""
        sizes = [each.block_size for each in layout.tables if not each.lifetime.rewritten]
        self.block_size = min(sizes, default=1)
        """The smallest, in tokens."""
        self._hit_step = max(each.block_size for each in layout.tables)
        """A hit ends where blocks of all tables end: their sizes are powers of two."""
        self._apart = max(each.lifetime.apart for each in layout.tables)
        self._epoch = 0
        self._make_pools()

    def _make_pools(self) -> None:
        indices = [PrefixIndex() for _ in self.layout.pools]
        self.pools = [
            BlockPool(each.num_blocks, index)
            for each, index in zip(self.layout.pools, indices, strict=True)
        ]
        grain = min(each.block_size for each in self.layout.tables)
        self._tables: list[BlockTable | StateTable] = []
        for number, each in enumerate(self.layout.tables):
            arguments = number, each, self.pools[each.pool], indices[each.pool], grain
            if each.lifetime.rewritten:
                self._tables.append(StateTable(*arguments))
            else:
                self._tables.append(BlockTable(*arguments))
        states = [each for each in self._tables if isinstance(each, StateTable)]
        self.checkpoints = Checkpoints(
            states if self.enable_prefix_caching else [], self._hit_step, self._apart, self._shares
        )
        """Copies of states; after :meth:`start_over` others."""

    @property
    def num_blocks(self) -> int:
        """All that requests can own."""
        return sum(each.num_blocks - 1 for each in self.pools)

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return sum(each.num_used for each in self.pools)

    @property
    def room(self) -> int:
        """Free blocks that are not reserved by a claim, of the pool that has fewest."""
        pools = {each.pool for each in self.layout.tables if not each.lifetime.rewritten}
        return min((self.pools[each].room for each in pools), default=0)

    @property
    def usage(self) -> float:
        """Of the fullest pool, owned blocks as a fraction of all that requests can own."""
        return max(each.num_used / (each.num_blocks - 1) for each in self.pools)

    def used_by_lifetime(self) -> dict[str, tuple[int, int]]:
        """Of each lifetime, the blocks (of a state: the slots) with at least one owner, and all
        that its pool has for requests. Lifetimes of one pool take from each other's."""
        return {
            str(each.lifetime): (each.num_used, each.pool.num_blocks - 1) for each in self._tables
        }

    def reserve(self, fraction: float, max_tokens: int) -> list[int]:
        """Of each pool, blocks to leave at an admission while others run: a fraction of all, and
        where windows move on, what a step of so many tokens takes for a while."""
        found = []
        for number, pool in enumerate(self.layout.pools):
            passing = sum(
                -(-max_tokens // each.block_size)
                for each in self.layout.of_pool(number)
                if each.lifetime.bounded and not each.lifetime.rewritten
            )
            passing = min(passing, int(pool.num_blocks * LARGEST_RESERVE))
            found.append(int(pool.num_blocks * fraction) + passing)
        return found

    # ---- prefixes ------------------------------------------------------------------------

    def match(self, request: CacheUser) -> Hit:
        """The longest prefix of the request's known tokens behind which it could go on. At least
        one token stays uncovered, so that there is something to compute.

        Changes nothing: the blocks may be lost until ``admit`` takes them.
        """
        if not self.enable_prefix_caching or request.skip_prefix_cache:
            return Hit()
        return longest_hit(self._tables, request, self._hit_step, self._apart)

    # ---- blocks --------------------------------------------------------------------------

    def may_fit(self, request: CacheUser, reserve: Sequence[int]) -> bool:
        """Whether ``admit`` could succeed with the best hit. Costs little, whereas to look for a
        hit takes longer the longer the request is."""
        room = {pool: pool.room - kept for pool, kept in zip(self.pools, reserve, strict=True)}
        for table in self._tables:
            room[table.pool] -= table.least_cost(request)
        return min(room.values()) >= 0

    def admit(self, request: CacheUser, hit: Hit, reserve: Sequence[int] = ()) -> bool:
        """Take the blocks of a hit; where all are kept, those of all known tokens; where they are
        bounded, a claim to as many as the request can need: all of them or none.

        Args:
            request: Owns no blocks yet.
            hit: What ``match`` returned.
            reserve: Of each pool, blocks that must stay without a claim; empty: none.

        Returns:
            False, with nothing changed, if too few blocks are free.
        """
        hits = hit.tables or [[] for _ in self._tables]
        cost: dict[BlockPool, int] = dict.fromkeys(self.pools, 0)
        for table, blocks in zip(self._tables, hits, strict=True):
            cost[table.pool] += table.cost(request, blocks)
        for number, pool in enumerate(self.pools):
            if cost[pool] + (reserve[number] if reserve else 0) > pool.room:
                return False
        for table, blocks in zip(self._tables, hits, strict=True):
            table.share(blocks)  # first, lest they be handed out as free blocks
        request.tables = [
            table.admit(request, blocks) for table, blocks in zip(self._tables, hits, strict=True)
        ]
        request.num_left = [
            0 if table.lifetime.rewritten else table.resumes(hit.length).start
            for table in self._tables
        ]
        request.num_indexed = [hit.length // table.size for table in self._tables]
        request.checkpoints, request.junction = [], hit.junction
        request.replay, request.state_begin = hit.replay, _NOT_VERIFIED
        request.cache_epoch = self._epoch
        if hit.length:
            self.checkpoints.resume(request, hits)
        self._note_places(request)
        self._note_commit(request)
        return True

    def grow(self, request: CacheUser, begin: int, end: int) -> int:
        """Make places for the tokens ``begin`` to ``end - 1``; those before are computed, or will
        be by steps that are scheduled.

        Returns:
            Up to which token there are places: less than ``end`` if too few blocks are free.
        """
        if end <= request.num_places:
            return end
        if not self._fits(request, begin, end):
            size = min(each.block_size for each in self.layout.tables)
            # The most blocks of the smallest size that fit.
            fits, too_many = request.num_places // size, -(-end // size)
            while too_many - fits > 1:
                middle = (fits + too_many) // 2
                if self._fits(request, begin, middle * size):
                    fits = middle
                else:
                    too_many = middle
            end = max(request.num_places, fits * size)
        for table in self._tables:
            table.grow(request, begin, end)
        self._note_places(request)
        return end

    def _fits(self, request: CacheUser, begin: int, end: int) -> bool:
        room = {pool: pool.room for pool in self.pools}
        for table in self._tables:
            room[table.pool] -= table.unclaimed(request, begin, end)
        return min(room.values()) >= 0

    def commit(self, request: CacheUser, num_tokens: int) -> None:
        """The first ``num_tokens`` tokens are computed and known: others may share full blocks, and
        those that no later token needs are given back. Their entries become the null block."""
        shares = self._shares(request)
        request.commit_at = min([t.commit(request, num_tokens, shares) for t in self._tables])

    def _shares(self, request: CacheUser) -> bool:
        # Blocks computed before a reset, or on top of such, must not come back.
        return self.enable_prefix_caching and request.cache_epoch == self._epoch

    def _note_places(self, request: CacheUser) -> None:
        request.num_places = min([table.places(request) for table in self._tables])

    def _note_commit(self, request: CacheUser) -> None:
        request.commit_at = min([table.commit_at(request) for table in self._tables])

    def free(self, request: CacheUser) -> None:
        """Take all blocks and claims from the request."""
        if request.tables:
            shares = self._shares(request)
            if shares:
                self.checkpoints.leave(request)
            for table in self._tables:
                table.free(request, shares)
        # New lists: a scheduled step may still refer to the old ones.
        request.tables, request.num_left, request.num_indexed = [], [], []
        request.checkpoints, request.junction = [], 0
        request.num_places, request.commit_at = 0, NEVER

    # ---- what is wrong, or not wanted any more -------------------------------------------

    def record_lookup(self, num_queried: int, num_found: int) -> None:
        """Count a lookup that led to an admission; numbers of tokens."""
        self.prefix_queries += num_queried
        self.prefix_hits += num_found

    def reset_prefix_cache(self) -> None:
        """Forget all cached content, as after a change of weights. Running requests keep their
        blocks, but no other request will share them."""
        for table in self._tables:
            table.index.clear()
        self._epoch += 1

    def forget_blocks(self, units: Collection[tuple[str, int]]) -> None:
        """What these blocks hold, each a unit's name and number, is wrong: no other request may
        share them any more."""
        for layout, pool in zip(self.layout.pools, self.pools, strict=True):
            for unit, block in units:
                if unit == layout.unit:
                    pool.forget(block)

    def forget(self, request: CacheUser) -> None:
        """What the request's blocks hold is wrong, or may be: no other request may share them any
        more, nor what is yet to be computed of it."""
        for table, blocks in zip(self._tables, request.tables, strict=False):
            for block in blocks:
                table.pool.forget(block)
        self.never_share(request)

    def owns(self, request: CacheUser, units: Collection[tuple[str, int]]) -> bool:
        """Whether one of the blocks is the request's, or has a copy of its state that will be
        offered to others."""
        held = [(n, block) for n, blocks in enumerate(request.tables) for block in blocks]
        held += [(each.table.number, each.slot) for each in request.checkpoints]
        layout = self.layout
        return any(
            block != NULL_BLOCK and (layout.pools[layout.tables[number].pool].unit, block) in units
            for number, block in held
        )

    def never_share(self, request: CacheUser) -> None:
        """Do not offer the blocks that the request has now to others, whatever is computed yet."""
        request.cache_epoch = _NO_EPOCH

    def start_over(self) -> None:
        """Take back all blocks and forget what they hold, in whatever state an interruption left
        them."""
        self._make_pools()
        self._epoch += 1
