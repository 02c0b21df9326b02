"""Where the rows of made-up steps have their cache blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import gt, sub

import numpy as np

from reprise.cache.layout import CacheLayout, TableLayout
from reprise.graphs.kinds import Ints

MIDDLE = 8
"""Blocks behind the middle of the cache to which rows write whose neighbours lie before it."""
NEIGHBOURS, SOME_NEIGHBOURS, SCATTERED = 1, 2, 3
LOWER, UPPER, BOTH = 0, 1, 2


@dataclass(frozen=True)
class Row:
    """One request of a probe."""

    new: int
    """Its new tokens."""
    length: int
    """All its tokens, the new ones included."""
    layout: int
    half: int
    known: bool = True
    """Its new tokens are; else it verifies drafts."""
    accepted: int = 0
    """Of its last step, tokens that count; 0: that step computed known ones."""


class Area:
    """A run of blocks in one half of the cache. Those that rows write are given out once each, from
    the end; those that they read may be read by many.

    Args:
        begin: Its first block.
        end: Behind its last one.
        written: Blocks that rows will write. Others lie in no order where no row writes, if there
            are any: a step of one request reads nothing that it writes but the newest tokens.
    """

    def __init__(self, begin: int, end: int, written: int = 0) -> None:
        self.begin, self.end = begin, end
        self.next = end
        self.read_end = end - written if end - written > begin else end
        self._shuffled: Ints | None = None

    @property
    def left(self) -> int:
        return self.next - self.begin

    def take(self, count: int) -> int:
        """The first of ``count`` neighbours that no other row writes."""
        self.next -= count
        return self.next

    def scattered(self, count: int, random: np.random.Generator) -> Ints:
        """Blocks of which none follows the one before it; none if the area is empty."""
        if self._shuffled is None:
            every_other = np.arange(self.begin, self.read_end, 2, dtype=np.int32)
            self._shuffled = random.permutation(every_other)
        size = len(self._shuffled)
        if size == 0:
            return self._shuffled
        places = np.arange(count)
        places += int(random.integers(size))
        return self._shuffled[places % size]


class PoolAreas:
    """The areas of one pool, in one probe.

    Args:
        num_blocks: Of the pool, the null block included.
        most: Blocks of an area that are of use.
        written: Blocks that rows will write.
    """

    def __init__(self, num_blocks: int, most: int, written: int) -> None:
        self.half = (num_blocks + 1) // 2
        self.lower = Area(1, min(self.half, 1 + most), written)
        self.upper = Area(max(self.half, num_blocks - most), num_blocks, written)
        self.middle = Area(self.half, self.half + MIDDLE)


class Placement:
    """Gives the rows of a probe blocks in every table. They read from two runs of blocks, at the
    lower and the upper end of a pool.

    Args:
        layout: Tables and pools.
        max_model_len: Length of the longest context.
        max_requests: Most requests in a step.
        max_tokens: Most tokens in a step.
    """

    def __init__(
        self, layout: CacheLayout, max_model_len: int, max_requests: int, max_tokens: int
    ) -> None:
        self._layout = layout
        self._most = []
        for number in range(len(layout.pools)):
            # Room for the longest contexts and for what a large step writes.
            most = 1
            for each in layout.of_pool(number):
                written = max(2 * max_requests, -(-max_tokens // each.block_size))
                most += each.entries(max_model_len) + written
            self._most.append(most)

    def written(self, row: Row, table: TableLayout) -> int:
        """Blocks that a row writes."""
        if table.lifetime.rewritten:
            return table.entries(row.length)
        first, last = (row.length - row.new) // table.span, (row.length - 1) // table.span
        return last - first + 1

    def most_requests(self, query_len: int) -> int:
        """Requests of so many tokens whose written blocks are all different."""
        most = []
        for number, pool in enumerate(self._layout.pools):
            blocks = 0
            for each in self._layout.of_pool(number):
                if each.lifetime.rewritten:
                    blocks += each.entries(query_len)
                else:
                    blocks += -(-max(1, query_len) // each.span) + 1
            most.append(max(1, (pool.num_blocks - 1) // blocks))
        return min(most)

    def that_fit(self, rows: Sequence[Row], tokens: int, requests: int) -> list[Row]:
        """As many of the rows as the bucket and the cache have room for; at least one."""
        layout = self._layout
        left = [each.num_blocks - 1 for each in layout.pools]
        fitting: list[Row] = []
        known: dict[Row, list[int]] = {}  # most rows are alike
        for each in rows:
            written = known.get(each) or known.setdefault(each, self._written_of_pools(each))
            if not fitting and any(n > room for n, room in zip(written, left, strict=True)):
                # Whole blocks from the first token on: fewer of them fit in any case.
                new = min(
                    room // len(layout.of_pool(number)) * table.span
                    for number, room in enumerate(left)
                    for table in layout.of_pool(number)
                )
                new = min(each.new, new)
                each = replace(each, new=new, length=new, accepted=0)
                written = self._written_of_pools(each)
            if each.new > tokens or len(fitting) == requests or any(map(gt, written, left)):
                continue
            tokens -= each.new
            left = [*map(sub, left, written)]
            fitting.append(each)
        return fitting

    def _written_of_pools(self, row: Row) -> list[int]:
        written = [0] * len(self._layout.pools)
        for each in self._layout.tables:
            written[each.pool] += self.written(row, each)
        return written

    def tables(self, rows: Sequence[Row], random: np.random.Generator) -> list[Ints]:
        """Of each table the blocks of each row, [R, M] int32; those that it writes belong to it
        alone. Blocks that a row needs no more are the null block."""
        written = np.sum([self._written_of_pools(each) for each in rows], axis=0)
        areas = [
            PoolAreas(pool.num_blocks, most, int(count))
            for pool, most, count in zip(self._layout.pools, self._most, written, strict=True)
        ]
        found = []
        # Long ones first: neighbours need room before what they write.
        order = sorted(range(len(rows)), key=lambda each: -rows[each].length)
        for layout in self._layout.tables:
            needed = [
                layout.lifetime.needed(row.length - row.new, row.length, layout.block_size)
                for row in rows
            ]
            alone = len(rows) == len(self._layout.of_pool(layout.pool)) == 1
            whole = np.zeros((len(rows), max(each.stop for each in needed)), dtype=np.int32)
            for index in order:
                row, blocks = rows[index], needed[index]
                span = layout.span
                if layout.lifetime.rewritten:
                    span, shorter = 1, Row(len(blocks), len(blocks), NEIGHBOURS, row.half)
                else:
                    left = blocks.start * span
                    shorter = Row(row.new, row.length - left, row.layout, row.half)
                whole[index, blocks.start : blocks.stop] = self._table(
                    shorter, span, areas[layout.pool], random, alone=alone
                )
            found.append(whole)
        return found

    def _table(
        self, row: Row, size: int, pool: PoolAreas, random: np.random.Generator, *, alone: bool
    ) -> Ints:
        first, last = (row.length - row.new) // size, (row.length - 1) // size
        written = last - first + 1
        middle, areas = pool.middle, (pool.lower, pool.upper)
        if (
            row.layout == NEIGHBOURS and row.half == BOTH
            and MIDDLE <= first <= pool.half - pool.lower.end
            and written <= middle.left and middle.end <= pool.upper.begin
        ):  # fmt: skip
            begin = middle.take(written)
            return np.arange(begin - first, begin + written, dtype=np.int32)
        own = areas[1 if row.half == UPPER else 0]
        if alone and row.layout == NEIGHBOURS and row.half == LOWER and last < own.left:
            # As the first request has them.
            return np.arange(own.begin, own.begin + last + 1, dtype=np.int32)
        if own.left < written:
            own = max(areas, key=lambda each: each.left)
        if own.left < written:  # what is left lies in both
            parts, missing = [], written
            for each in areas:
                count = min(each.left, missing)
                begin = each.take(count)
                parts.append(np.arange(begin, begin + count, dtype=np.int32))
                missing -= count
            mine = np.concatenate(parts)
            return np.concatenate((np.resize(mine, first), mine)).astype(np.int32)
        begin = own.take(written)
        if first == 0 and written == 1:
            return np.array((begin,), dtype=np.int32)
        mine = np.arange(begin, begin + written, dtype=np.int32)
        if row.layout == NEIGHBOURS and begin - first >= own.begin and row.half != BOTH:
            return np.arange(begin - first, begin + written, dtype=np.int32)
        if row.layout == SCATTERED:
            mine = mine[::-1]
        other = areas[0] if own is areas[1] else areas[1]
        source = other if row.half == BOTH and other.end > other.begin else own
        read = source.scattered(first, random)
        if len(read) < first:
            read = np.resize(mine, first)
        if row.layout != SCATTERED and first > 2:
            half = min(first // 2, source.read_end - source.begin)
            read[:half] = np.arange(source.begin, source.begin + half)
        return np.concatenate((read, mine)).astype(np.int32)
