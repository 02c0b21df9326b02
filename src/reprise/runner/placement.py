"""Where the rows of made-up steps have their cache blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import add, gt, or_, sub

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
    the end; those that they read may be read by many, and are written by none."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.next = end

    @property
    def left(self) -> int:
        return self.next - self.begin

    def take(self, count: int) -> int:
        """The first of ``count`` neighbours that no other row writes."""
        self.next -= count
        return self.next


class PoolAreas:
    """The areas of one pool, in one probe.

    Args:
        num_blocks: Of the pool, the null block included.
        most: Blocks of an area that are of use.
        written: Blocks that rows will write.
    """

    def __init__(self, num_blocks: int, most: int, written: int) -> None:
        self.half = (num_blocks + 1) // 2
        self.lower = Area(1, min(self.half, 1 + most))
        self.upper = Area(max(self.half, num_blocks - most), num_blocks)
        self.middle = Area(self.half, self.half + MIDDLE)
        self.owed = written
        self._written = np.zeros(num_blocks, dtype=bool)
        self._orders: dict[tuple[int, int], Ints] = {}

    def spare(self, count: int) -> bool:
        """Whether ``count`` blocks could be set apart, with what is left for all that rows will
        write and one for others to read."""
        return self.lower.left + self.upper.left > self.owed + count

    def write(self, blocks: Ints) -> Ints:
        """Note that a row writes them."""
        self._written[blocks] = True
        self.owed -= len(blocks)
        return blocks

    def read(self, area: Area, count: int, random: np.random.Generator) -> Ints:
        """So many blocks that no row writes, of which none follows the one before it if there are
        enough; those of ``area``, or others where it has none; else the null block. Once all
        that is written is known."""
        for each in (area, self.lower, self.upper):
            order = self._order(each, random)
            if len(order):
                places = np.arange(count) + int(random.integers(len(order)))
                return order[places % len(order)]
        return np.zeros(count, dtype=np.int32)

    def _order(self, area: Area, random: np.random.Generator) -> Ints:
        key = area.begin, area.end
        if key not in self._orders:
            free = np.arange(*key, dtype=np.int32)
            free = free[~self._written[free]]
            self._orders[key] = random.permutation(free[(free - area.begin) % 2 == 0])
            if not len(self._orders[key]):
                self._orders[key] = free
        return self._orders[key]


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
        """As many of the rows as the bucket and the cache have room for; at least one. Where any of
        them reads blocks, one is left that none writes."""
        layout = self._layout
        left = [each.num_blocks - 1 for each in layout.pools]
        fitting: list[Row] = []
        known: dict[Row, tuple[list[int], list[bool]]] = {}  # most rows are alike
        reading = [False] * len(left)
        for each in rows:
            if each not in known:
                known[each] = self._written_of_pools(each), self._read_of_pools(each)
            written, reads = known[each]
            reads = [*map(or_, reading, reads)]
            needed = [*map(add, written, reads)]
            if not fitting and any(map(gt, needed, left)):
                # Whole blocks from the first token on: fewer of them fit in any case.
                new = min(
                    room // len(layout.of_pool(number)) * table.span
                    for number, room in enumerate(left)
                    for table in layout.of_pool(number)
                )
                new = min(each.new, new)
                each = replace(each, new=new, length=new, accepted=0)
                needed = written = self._written_of_pools(each)
                reads = reading
            if each.new > tokens or len(fitting) == requests or any(map(gt, needed, left)):
                continue
            tokens -= each.new
            left, reading = [*map(sub, left, written)], reads
            fitting.append(each)
        return fitting

    def _read_of_pools(self, row: Row) -> list[bool]:
        """Of each pool, whether it reads blocks that it does not write."""
        reads, begin = [False] * len(self._layout.pools), row.length - row.new
        for each in self._layout.tables:
            if not each.lifetime.rewritten:
                first = each.lifetime.needed(begin, row.length, each.block_size).start
                reads[each.pool] |= begin // each.span > first
        return reads

    def _written_of_pools(self, row: Row) -> list[int]:
        written = [0] * len(self._layout.pools)
        for each in self._layout.tables:
            written[each.pool] += self.written(row, each)
        return written

    def tables(self, rows: Sequence[Row], random: np.random.Generator) -> list[Ints]:
        """Of each table the blocks of each row, [R, M] int32. Those that it writes belong to it
        alone, and neither it nor another row reads them, of no table: as in an engine's steps,
        nothing in the step writes what is older than the step. Blocks that a row needs no more are
        the null block."""
        written = np.sum([self._written_of_pools(each) for each in rows], axis=0)
        areas = [
            PoolAreas(pool.num_blocks, most, int(count))
            for pool, most, count in zip(self._layout.pools, self._most, written, strict=True)
        ]
        # Long ones first: neighbours need room before what they write.
        order = sorted(range(len(rows)), key=lambda each: -rows[each].length)
        found, later = [], []
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
                entries = whole[index, blocks.start : blocks.stop]
                if not self._write(shorter, span, areas[layout.pool], entries, alone=alone):
                    later.append((shorter, span, areas[layout.pool], entries))
            found.append(whole)
        for each in later:
            self._read(*each, random)
        return found

    def _write(self, row: Row, size: int, pool: PoolAreas, entries: Ints, *, alone: bool) -> bool:
        """Give the row what it writes; whether it has all that it reads, too."""
        first, last = (row.length - row.new) // size, (row.length - 1) // size
        written = last - first + 1
        middle, areas = pool.middle, (pool.lower, pool.upper)
        if (
            row.layout == NEIGHBOURS and row.half == BOTH
            and MIDDLE <= first <= pool.half - pool.lower.end
            and written <= middle.left == MIDDLE and middle.end <= pool.upper.begin
        ):  # fmt: skip
            begin = middle.take(written)
            entries[:] = np.arange(begin - first, begin + written, dtype=np.int32)
            pool.owed -= written
            return True
        own = areas[1 if row.half == UPPER else 0]
        if (
            row.layout == NEIGHBOURS and row.half != BOTH
            and 0 < first <= own.left - written and pool.spare(first)
        ):  # fmt: skip
            begin = own.take(first + written)
            if alone and row.half == LOWER:  # as the first request has them
                begin = own.begin
            entries[:first] = np.arange(begin, begin + first)
            entries[first:] = pool.write(np.arange(begin + first, begin + first + written))
            return True
        if own.left < written:
            own = max(areas, key=lambda each: each.left)
        if own.left >= written:
            begin = own.take(written)
            mine = np.arange(begin, begin + written, dtype=np.int32)
            if row.layout == SCATTERED:
                mine = mine[::-1]
        else:  # what is left lies in both
            parts, missing = [], written
            for each in areas:
                count = min(each.left, missing)
                begin = each.take(count)
                parts.append(np.arange(begin, begin + count, dtype=np.int32))
                missing -= count
            mine = np.concatenate(parts)
        entries[first:] = pool.write(mine)
        return first == 0

    def _read(
        self, row: Row, size: int, pool: PoolAreas, entries: Ints, random: np.random.Generator
    ) -> None:
        """Give the row what it reads, which no step writes."""
        first = (row.length - row.new) // size
        upper = bool(entries[first] >= pool.half)
        own, other = (pool.upper, pool.lower) if upper else (pool.lower, pool.upper)
        source = other if row.half == BOTH and other.end > other.begin else own
        entries[:first] = pool.read(source, first, random)
        if row.layout != SCATTERED and first > 2:
            half = min(first // 2, source.left)
            entries[:half] = np.arange(source.begin, source.begin + half)
