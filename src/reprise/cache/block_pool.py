"""Reference-counted cache blocks, with the free ones in the order in which to reuse them."""

from __future__ import annotations

from collections.abc import Iterable

from reprise.cache.prefix import PrefixIndex
from reprise.errors import CapacityError, ConfigError

NULL_BLOCK = 0
"""Padding rows read and write it; it never belongs to a request."""


class BlockPool:
    """Hands out blocks 1 to ``num_blocks - 1``. Each operation is O(1) a block.

    A free block keeps its indexed content until it is handed out again. Free blocks without
    content go first, then those whose content was let go longest ago.

    Raises:
        ConfigError: Fewer than two blocks: nothing is left beside the null block.
    """

    def __init__(self, num_blocks: int, index: PrefixIndex | None = None) -> None:
        if num_blocks < 2:
            raise ConfigError(
                f"num_blocks={num_blocks}: give at least 2, block 0 is the null block"
            )
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self.num_claimed = 0
        """Of the free blocks, how many owners will need and may take without asking."""
        self._index = PrefixIndex() if index is None else index
        self._refs = [0] * num_blocks
        # The free blocks as a ring of links; the null block, never in it, closes the ring:
        # next[0] is reused first, previous[0] last.
        self._next = [*range(1, num_blocks), NULL_BLOCK]
        self._previous = [num_blocks - 1, *range(num_blocks - 1)]

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - 1 - self.num_free

    @property
    def room(self) -> int:
        """Free blocks that are not reserved by a claim."""
        return self.num_free - self.num_claimed

    def ref_count(self, block: int) -> int:
        return self._refs[block]

    def is_free(self, block: int) -> bool:
        return block != NULL_BLOCK and self._refs[block] == 0

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take blocks and forget what they held; each gets one owner.

        Args:
            count: How many.
            after: The block that they continue. A block's physical neighbour is preferred if it
                is free and holds nothing: attention reads runs of blocks faster.

        Raises:
            CapacityError: Fewer are free; none was taken.
        """
        if count > self.num_free:
            raise CapacityError(f"{count} cache blocks wanted, {self.num_free} are free")
        taken = []
        last = self.num_blocks if after is None else after
        for _ in range(count):
            block = last + 1
            if block >= self.num_blocks or self._refs[block] or block in self._index:
                block = self._next[NULL_BLOCK]
                self._index.evict(block)
            self._unlink(block)
            self._refs[block] = 1
            taken.append(block)
            last = block
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add one owner to each block; free ones are taken with their content."""
        for block in blocks:
            self._refuse_null(block)
            if self._refs[block] == 0:
                self._unlink(block)
            self._refs[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take one owner from each block. Of those left without, earlier ones are reused earlier.

        Raises:
            RuntimeError: A block is the null block or has no owner (a bug, not a user's error).
        """
        for block in blocks:
            self._refuse_null(block)
            if self._refs[block] == 0:
                raise RuntimeError(f"cache block {block} is freed twice")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._link(block)

    def forget(self, block: int) -> None:
        """Drop the block from the prefix index: what it holds is found by no request."""
        self._index.evict(block)

    def _link(self, block: int) -> None:
        # Without content: to the front. With content: to the back.
        if block in self._index:
            before, behind = self._previous[NULL_BLOCK], NULL_BLOCK
        else:
            before, behind = NULL_BLOCK, self._next[NULL_BLOCK]
        self._previous[block], self._next[block] = before, behind
        self._next[before] = self._previous[behind] = block
        self.num_free += 1

    def _unlink(self, block: int) -> None:
        before, behind = self._previous[block], self._next[block]
        self._next[before], self._previous[behind] = behind, before
        self.num_free -= 1

    @staticmethod
    def _refuse_null(block: int) -> None:
        if block == NULL_BLOCK:
            raise RuntimeError("the null block belongs to no request")
