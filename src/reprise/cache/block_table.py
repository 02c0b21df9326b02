"""What a request owns of a table of blocks."""

from __future__ import annotations

from collections.abc import Sequence

from reprise.cache.block_pool import NULL_BLOCK
from reprise.cache.request_table import CacheUser, RequestTable


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
        """The least that an admission takes, whatever the prefix cache has."""
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
