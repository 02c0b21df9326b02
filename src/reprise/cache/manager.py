"""Gives requests the blocks they need, and shares blocks that hold the same prefix."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from reprise.cache.block_pool import NULL_BLOCK, BlockPool
from reprise.cache.layout import CacheLayout
from reprise.cache.prefix import PrefixIndex
from reprise.cache.spec import NEVER
from reprise.cache.tables import BlockTable, CacheUser, Checkpoint, Copy, StateTable
from reprise.errors import ConfigError

_NO_EPOCH = -1
_NOT_VERIFIED = -1
LARGEST_RESERVE = 1 / 4
"""Of a pool, what an admission may have to leave for others at most."""


@dataclass(frozen=True)
class Hit:
    """What the cache has of a request's tokens."""

    length: int = 0
    """In tokens, from the first one on."""
    tables: Sequence[Sequence[int]] = ()
    """Of each table the blocks of these tokens; the null block for those that nobody needs."""
    junction: int = 0
    """So long a prefix there would be, had its states been copied; 0: it is none that is worth it.
    Others may have it, too."""
    replay: int = 0
    """Of these tokens the last ones, which its states have beside them: who goes on from there
    replays them first."""


class CacheManager:
    """The one owner of the block pools and of the prefix indices.

    A request's way: ``match``, ``admit`` with what matched, then ``grow`` before tokens are
    computed and ``commit`` when they were, at last ``free``.

    A request whose blocks are bounded has a claim to as many as it may own between two steps, from
    its admission on, so that it never waits for others half-way. What it owns beyond that, because
    a step computes many of its tokens, and what tables that grow with their requests take, comes
    from the blocks to which nobody has a claim.

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
        self._states: list[StateTable] = []
        self._tables: list[BlockTable | StateTable] = []
        for number, each in enumerate(self.layout.tables):
            arguments = number, each, self.pools[each.pool], indices[each.pool], grain
            if each.lifetime.rewritten:
                self._states.append(StateTable(*arguments))
                self._tables.append(self._states[-1])
            else:
                self._tables.append(BlockTable(*arguments))
        self._copies: list[tuple[Copy, Checkpoint | None]] = []
        """What is to be copied, and what checkpoint it makes, if it makes one."""
        self._borrowed: list[tuple[StateTable, int]] = []
        """Checkpoints that are sources of these copies."""

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
        """Of the pool that has least, free blocks to which nobody has a claim."""
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
        """The longest prefix of the request's known tokens behind which it could go on: every table
        has the blocks that it needs there.

        At least one token stays uncovered, so that there is something to compute. Changes
        nothing: the blocks may be lost until ``admit`` takes them.
        """
        step = self._hit_step
        length = (len(request.token_ids) - 1) // step * step
        if not self.enable_prefix_caching or request.skip_prefix_cache:
            length = 0
        found: list[list[int]] = []
        runs: list[list[int]] = []
        for table in self._tables:
            blocks, lengths = table.find(request, length)
            found.append(blocks)
            runs.append(lengths)
            length = min(length, len(blocks) * table.size // step * step)

        def resumes(states: bool) -> bool:
            return all(
                run[length // table.size - 1] >= len(table.resumes(length))
                for table, run in zip(self._tables, runs, strict=True)
                if states or not table.lifetime.rewritten
            )

        while length and not resumes(states=False):
            length -= step
        junction = length
        replays: set[int] = set()
        while length:
            if resumes(states=True):
                replays = {
                    table.replay(found[table.number][length // table.size - 1])
                    for table in self._states
                }
                if len(replays) <= 1:  # one number is told of a request
                    break
            length -= step
        if junction - length < self._apart:
            junction = 0
        if not length:
            return Hit(junction=junction)
        tables = []
        for table, blocks in zip(self._tables, found, strict=True):
            needed = table.resumes(length)
            tables.append([NULL_BLOCK] * needed.start + blocks[needed.start : needed.stop])
        return Hit(length, tables, junction, max(replays, default=0))

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
            for table in self._states:
                source = hits[table.number][-1]
                copy = Copy(table.number, source, request.tables[table.number][0])
                self._copies.append((copy, None))
                self._borrowed.append((table, source))
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
                self._leave_states(request)
            for table in self._tables:
                table.free(request, shares)
        # New lists: a scheduled step may still refer to the old ones.
        request.tables, request.num_left, request.num_indexed = [], [], []
        request.checkpoints, request.junction = [], 0
        request.num_places, request.commit_at = 0, NEVER

    # ---- states --------------------------------------------------------------------------

    def chunk_end(self, request: CacheUser, begin: int, end: int, known: int) -> int:
        """Where a chunk had better end than at ``end``, so that a state is met where others could
        go on from it.

        Args:
            request: Whose it is.
            begin: Of the chunk.
            end: The furthest it can go.
            known: Tokens of the request.
        """
        if not self._states or not self.enable_prefix_caching:
            return end
        for cut in self._cuts(request, known):
            if begin < cut < end:
                return cut
        aligned = end // self._apart * self._apart
        return aligned if begin < aligned and end < known else end

    def _cuts(self, request: CacheUser, known: int) -> tuple[int, int]:
        """Where others may go on from a request with so many known tokens: behind what it shares
        with one before it, and behind its last whole block; 0: not worth it."""
        last = (known - 1) // self._hit_step * self._hit_step
        return request.junction, last if last >= self._apart else 0

    def checkpoint(
        self,
        request: CacheUser,
        length: int,
        known: int = 0,
        *,
        replay: int = 0,
        certain: bool = True,
    ) -> None:
        """Keep the request's states as they are before the step that is scheduled now, ``length``
        tokens being computed.

        Args:
            request: Whose.
            length: Its computed tokens.
            known: Of one whose known tokens are computed, how many there are.
            replay: Of the computed tokens the last ones, that are beside the states, not in them.
            certain: Else the next update tells whether so many are computed.
        """
        if length == 0 or not self.enable_prefix_caching:
            return
        if length % self._apart and length not in self._cuts(request, known):
            return
        if length % self._hit_step:
            return
        if request.cache_epoch != self._epoch:
            return
        for table in self._states:
            copy = table.checkpoint(request, length, replay, certain=certain)
            if copy is not None:
                self._copies.append(copy)
        self._note_commit(request)

    def checkpoint_behind_drafts(
        self, request: CacheUser, most: int, pending: int, known: int
    ) -> None:
        """:meth:`checkpoint` of a request that verifies drafts: between two steps its states are
        those before the tokens of the last one, which are beside them.

        Args:
            request: Whose.
            most: Its computed tokens, those drafts included that may count.
            pending: Steps of it that are under way.
            known: Tokens that it was admitted with.
        """
        if most == known:  # the last step was a chunk
            self.checkpoint(request, most)
            return
        if pending > 1:
            return  # nobody knows where the last one began
        begin = len(request.token_ids) - 1 if pending else request.state_begin
        length = most // self._apart * self._apart
        if begin < length:
            replay = length - begin
            self.checkpoint(request, length, replay=replay, certain=not pending)

    def _leave_states(self, request: CacheUser) -> None:
        """The request ends, or is preempted, and no step of it is under way: what its states are
        behind the last step that verified drafts stays, where it would have been copied."""
        length = (len(request.token_ids) - 1) // self._apart * self._apart
        if not 0 <= request.state_begin < length or length % self._hit_step:
            return
        for table in self._states:
            table.leave(request, length)

    def take_copies(self) -> list[tuple[Copy, Checkpoint | None]]:
        """The copies to be made before the step that is scheduled now, and the checkpoints that
        some of them make. A checkpoint that is copied may be given out from the next step on: the
        device has copied it by then. One that is made is offered to others once it is known to be
        ``sound``."""
        copies, self._copies = self._copies, []
        for table, slot in self._borrowed:
            table.pool.free([slot])
        self._borrowed = []
        return copies

    @property
    def has_states(self) -> bool:
        return bool(self._states)

    # ---- what is wrong, or not wanted any more -------------------------------------------

    def record_lookup(self, num_queried: int, num_found: int) -> None:
        """Count a lookup that led to an admission; numbers of tokens."""
        self.prefix_queries += num_queried
        self.prefix_hits += num_found

    def reset_prefix_cache(self) -> None:
        """Forget all cached content, as after a change of weights. Running requests keep their
        blocks, but nobody will share them."""
        for table in self._tables:
            table.index.clear()
        self._epoch += 1

    def forget_blocks(self, units: Collection[tuple[str, int]]) -> None:
        """What these blocks hold is wrong, (what they are called, number) each: nobody may share
        them any more."""
        for layout, pool in zip(self.layout.pools, self.pools, strict=True):
            for unit, block in units:
                if unit == layout.unit:
                    pool.forget(block)

    def forget(self, request: CacheUser) -> None:
        """What the request's blocks hold is wrong, or may be: nobody may share them any more, nor
        what is computed of it yet."""
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
