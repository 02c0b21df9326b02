"""What a request owns of each table: blocks for its tokens, or one state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reprise.cache.block_pool import NULL_BLOCK, BlockPool
from reprise.cache.layout import TableLayout
from reprise.cache.prefix import NO_PARENT, PrefixIndex, block_digest
from reprise.cache.spec import NEVER


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

    table: StateTable
    length: int
    """Tokens behind which the state was this."""
    slot: int
    replay: int = 0
    """Of these the last ones, that the copy has beside the state and not in it."""
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


class BlockTable(RequestTable):
    """Blocks that hold the rows of a request's tokens."""

    _num_used = 0

    @property
    def num_used(self) -> int:
        """Blocks that have an owner. Others of the pool may be another table's."""
        return self._num_used

    def _claim(self, request: CacheUser, held: int) -> int:
        """Blocks that the request may still take without asking, if it holds so many."""
        if not self.bounded:
            return 0
        # The last token is never computed.
        return max(0, self._layout.most(request.max_total_tokens - 1) - held)

    def _held(self, request: CacheUser) -> int:
        return len(request.tables[self.number]) - request.num_left[self.number]

    # ---- admission -----------------------------------------------------------------------

    def least_cost(self, request: CacheUser) -> int:
        """Of an admission, whatever the prefix cache has."""
        return self._claim(request, 0)

    def cost(self, request: CacheUser, hit: Sequence[int]) -> int:
        """Blocks that an admission takes or lays claim to."""
        held = [each for each in hit if each != NULL_BLOCK]
        if self.lifetime.bounded:
            return len(held) + self._claim(request, len(held))
        new = self.lifetime.needed(0, len(request.token_ids), self.size).stop - len(hit)
        return new + sum(map(self.pool.is_free, held))

    def share(self, hit: Sequence[int]) -> None:
        """Add an owner to the blocks of a hit. Where they are bounded, another owner's block costs
        as much as a free one: it may give the block back, and need another, while this request
        still has it."""
        held = [each for each in hit if each != NULL_BLOCK]
        if self.lifetime.bounded:
            self.pool.num_claimed += sum(not self.pool.is_free(each) for each in held)
        free = self.pool.num_free
        self.pool.share(held)
        self._num_used += free - self.pool.num_free

    def admit(self, request: CacheUser, hit: Sequence[int]) -> list[int]:
        """The request's table, whose other entries are those of the hit, which are shared; counts
        what it lays claim to."""
        held = sum(each != NULL_BLOCK for each in hit)
        self.pool.num_claimed += self._claim(request, held)
        new = 0
        if not self.lifetime.bounded:
            new = self.lifetime.needed(0, len(request.token_ids), self.size).stop - len(hit)
        return [*hit, *self._allocate(new, hit[-1] if held else None)]

    def _allocate(self, count: int, after: int | None) -> list[int]:
        taken = self.pool.allocate(count, after=after)
        self._num_used += count
        return taken

    # ---- growth --------------------------------------------------------------------------

    def _missing(self, request: CacheUser, begin: int, end: int) -> int:
        stop = self.lifetime.needed(begin, end, self.size).stop
        return max(0, stop - len(request.tables[self.number]))

    def unclaimed(self, request: CacheUser, begin: int, end: int) -> int:
        """Blocks without a claim that it takes to compute these tokens."""
        claim = self._claim(request, self._held(request))
        return max(0, self._missing(request, begin, end) - claim)

    def grow(self, request: CacheUser, begin: int, end: int) -> None:
        count, held = self._missing(request, begin, end), self._held(request)
        if count:
            blocks = request.tables[self.number]
            taken = self._allocate(count, blocks[-1] if held else None)
            self._count_claim(request, held, held + count)
            blocks += taken

    def _count_claim(self, request: CacheUser, before: int, now: int) -> None:
        self.pool.num_claimed += self._claim(request, now) - self._claim(request, before)

    def places(self, request: CacheUser) -> int:
        """Tokens that have a place."""
        return len(request.tables[self.number]) * self.size

    # ---- what is computed ----------------------------------------------------------------

    def commit(self, request: CacheUser, num_tokens: int, shares: bool) -> int:
        """The first ``num_tokens`` tokens are computed and known.

        Args:
            request: Whose.
            num_tokens: How many.
            shares: Others may find them.

        Returns:
            See :meth:`commit_at`.
        """
        number, size = self.number, self.size
        blocks = request.tables[number]
        indexed, left = request.num_indexed[number], request.num_left[number]
        num_full = num_tokens // size
        if num_full > indexed:
            if shares:
                for position in range(max(indexed, left), num_full):
                    self.index.insert(self.key(request, (position + 1) * size), blocks[position])
            request.num_indexed[number] = indexed = num_full
        if not self.bounded:
            return (indexed + 1) * size
        end = left
        while end < len(blocks) and self.lifetime.leaves(end, self.size) <= num_tokens:
            end += 1
        if end > left:
            self._give_back(blocks[left:end])
            self._count_claim(request, len(blocks) - left, len(blocks) - end)
            blocks[left:end] = [NULL_BLOCK] * (end - left)
            request.num_left[number] = end
        return self.commit_at(request)

    def commit_at(self, request: CacheUser) -> int:
        """How many tokens have to be computed for ``commit`` to have something to do."""
        full = (request.num_indexed[self.number] + 1) * self.size
        return min(full, self.lifetime.leaves(request.num_left[self.number], self.size))

    def _give_back(self, blocks: Sequence[int]) -> None:
        if self.lifetime.bounded:
            self.pool.num_claimed -= sum(self.pool.ref_count(each) > 1 for each in blocks)
        free = self.pool.num_free
        self.pool.free(blocks)
        self._num_used += free - self.pool.num_free

    def free(self, request: CacheUser, shares: bool) -> None:
        """Take back all blocks and claims; the request's last blocks are reused first."""
        self.pool.num_claimed -= self._claim(request, self._held(request))
        self._give_back(request.tables[self.number][request.num_left[self.number] :][::-1])


class StateTable(RequestTable):
    """One state a request, and copies of states as they were behind some of their tokens.

    Others that begin with the same tokens go on from a copy of the copy. A checkpoint that nobody
    copies just now has no owner: a request that needs a state takes its place.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._replays: dict[int, int] = {}
        """Of the checkpoints that are offered, by slot."""

    @property
    def num_used(self) -> int:
        """States that have an owner; a pool of states is of one table."""
        return self.pool.num_used

    @property
    def _rows(self) -> int:
        """Of a request: its state, and what may be beside it."""
        return len(self.lifetime.needed(0, 1, self.size))

    def least_cost(self, request: CacheUser) -> int:
        return self._rows

    def cost(self, request: CacheUser, hit: Sequence[int]) -> int:
        # The checkpoint is not to be given out before it is copied.
        return self._rows + sum(self.pool.is_free(each) for each in hit if each != NULL_BLOCK)

    def share(self, hit: Sequence[int]) -> None:
        self.pool.share([each for each in hit if each != NULL_BLOCK])

    def admit(self, request: CacheUser, hit: Sequence[int]) -> list[int]:
        return self.pool.allocate(self._rows)

    def unclaimed(self, request: CacheUser, begin: int, end: int) -> int:
        return 0

    def grow(self, request: CacheUser, begin: int, end: int) -> None:
        """It has what it needs."""

    def places(self, request: CacheUser) -> int:
        return NEVER

    def replay(self, block: int) -> int:
        """Of the tokens behind which a checkpoint is, how many it has beside the state."""
        return self._replays.get(block, 0)

    def checkpoint(
        self, request: CacheUser, length: int, replay: int, *, certain: bool
    ) -> tuple[Copy, Checkpoint] | None:
        """Keep the request's state as it is behind ``length`` tokens, if there is a place for it
        that is nobody's and if nobody has done so."""
        known = length <= len(request.token_ids)
        if self.pool.room < 1 or (known and self.index.find(self.key(request, length))):
            return None
        (slot,) = self.pool.allocate(1)
        kept = Checkpoint(self, length, slot, replay, certain)
        request.checkpoints.append(kept)
        return Copy(self.number, request.tables[self.number][0], slot), kept

    def commit(self, request: CacheUser, num_tokens: int, shares: bool) -> int:
        for each in [each for each in request.checkpoints if each.table is self]:
            if not each.certain:
                each.certain = each.length <= num_tokens
                if not each.certain:
                    request.checkpoints.remove(each)
                    self.pool.free([each.slot])
                    continue
            if each.length > num_tokens or each.sound is None:
                continue
            request.checkpoints.remove(each)
            self._offer(request, each, shares)
        return self.commit_at(request)

    def _offer(self, request: CacheUser, kept: Checkpoint, shares: bool) -> None:
        # A state that is no number would spoil every request that begins with these tokens.
        if shares and kept.certain and kept.sound:
            self._insert(request, kept.length, kept.slot, kept.replay)
        self.pool.free([kept.slot])

    def _insert(self, request: CacheUser, length: int, slot: int, replay: int) -> None:
        self.index.insert(self.key(request, length), slot)
        self._replays[slot] = replay

    def commit_at(self, request: CacheUser) -> int:
        mine = [each for each in request.checkpoints if each.table is self]
        return min((each.length if each.certain else 0 for each in mine), default=NEVER)

    def leave(self, request: CacheUser, length: int) -> None:
        """The request gives its state up, which was left before its last step's tokens with these
        beside it: it is what was behind ``length`` tokens, if nobody has kept that."""
        if not self.index.find(self.key(request, length)):
            slot = request.tables[self.number][0]
            self._insert(request, length, slot, length - request.state_begin)

    def free(self, request: CacheUser, shares: bool) -> None:
        for each in request.checkpoints:
            if each.table is self:
                self._offer(request, each, shares)
        self.pool.free(request.tables[self.number])
