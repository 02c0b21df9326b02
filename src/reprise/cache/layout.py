"""Which caches share a block table, and which tables share a pool of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from reprise.cache.spec import KEPT, LayerCache, Lifetime, Rows

AHEAD = 2
"""Steps that may be under way at once."""


@dataclass(frozen=True)
class TableLayout:
    """The caches of one lifetime: one block table a request says where the rows of all are."""

    lifetime: Lifetime
    block_size: int
    """Tokens that a block spans in every cache."""
    pool: int = 0
    """Which pool the blocks are from."""
    ahead: int = AHEAD
    """Tokens that may be scheduled behind a request's computed ones while it decodes."""
    compressed: tuple[int, ...] = ()
    """How many tokens rows of these caches stand for, where it is more than one."""

    def entries(self, length: int) -> int:
        """Entries in the table of a request of ``length`` tokens."""
        return max(1, self.lifetime.needed(0, length, self.block_size).stop)

    @property
    def span(self) -> int:
        """Tokens of an entry: all, where it is a state."""
        return 1 << 40 if self.lifetime.rewritten else self.block_size

    def most(self, length: int) -> int:
        """Blocks that a request of at most ``length`` tokens may own at once while it decodes."""
        return self.lifetime.most(length, self.block_size, self.ahead)


@dataclass(frozen=True)
class PoolLayout:
    """Blocks of equal layout. Those of several tables may come from one pool: a block is then a
    piece of memory that belongs to one table at a time, so that none of them needs to know
    beforehand how much the others will need."""

    block_bytes: int
    """Bytes of a block in all caches of one table."""
    num_blocks: int = 1
    """The null block included."""
    unit: str = "block"
    """What a block is called; of each pool something else."""


@dataclass(frozen=True)
class CacheLayout:
    """All block tables and pools of a model."""

    tables: tuple[TableLayout, ...]
    pools: tuple[PoolLayout, ...]

    @property
    def main(self) -> int:
        """The pool that takes what the others leave: that of the first table, which is the kept
        one if there is one."""
        return self.tables[0].pool

    def of_pool(self, pool: int) -> Sequence[TableLayout]:
        return [each for each in self.tables if each.pool == pool]

    def sized(self, num_blocks: Sequence[int]) -> CacheLayout:
        """The same with pools of so many blocks."""
        pools = tuple(
            replace(each, num_blocks=count)
            for each, count in zip(self.pools, num_blocks, strict=True)
        )
        return CacheLayout(self.tables, pools)

    def most(self, pool: int, length: int) -> int:
        """Blocks of a pool that a request of at most ``length`` tokens may own at once."""
        return sum(each.most(length) for each in self.of_pool(pool))

    def requests(self, length: int) -> int:
        """The most requests of ``length`` tokens each that the pools hold at once."""
        return min(
            (pool.num_blocks - 1) // self.most(number, length)
            for number, pool in enumerate(self.pools)
        )

    @property
    def capacity(self) -> int:
        """Tokens that a request alone can have: the longest for which every pool has the blocks."""
        fits, too_long = 0, 1 << 40
        if self._fits(too_long):
            return too_long
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            fits, too_long = (middle, too_long) if self._fits(middle) else (fits, middle)
        return fits

    def _fits(self, length: int) -> bool:
        return all(
            self.most(number, length) < pool.num_blocks for number, pool in enumerate(self.pools)
        )


def one_table(num_blocks: int, block_size: int, lifetime: Lifetime = KEPT) -> CacheLayout:
    """Caches of one lifetime, of whatever bytes."""
    table = TableLayout(lifetime, block_size)
    return CacheLayout((table,), (PoolLayout(0, num_blocks),))


def lay_out_caches(
    caches: Mapping[str, LayerCache], block_size: int, num_drafts: int = 0, lookahead: int = 0
) -> CacheLayout:
    """The tables and pools of a model's caches; pools have the null block alone.

    Args:
        caches: By name.
        block_size: As the options or the platform prefer it.
        num_drafts: Tokens that a decode verifies beside its newest one.
        lookahead: Tokens behind them that a draft model writes.
    """
    tables: list[TableLayout] = []
    pools: list[PoolLayout] = []
    signatures: list[tuple[int, list[Rows]] | None] = []
    """Of each pool, what other tables may share it."""
    for lifetime, group in by_lifetime(caches.values()).items():
        rows = [each for cache in group for each in cache.rows.values()]
        size = lifetime.block_size(block_size, max(each.every for each in rows))
        signature = None if lifetime.rewritten else (size, rows)
        if signature is None or signature not in signatures:
            signatures.append(signature)
            nbytes = sum(each.block_bytes(size) for each in group)
            pools.append(PoolLayout(nbytes, unit=f"block ({lifetime})" if pools else "block"))
            number = len(pools) - 1
        else:
            number = signatures.index(signature)
        ahead = AHEAD * (1 + num_drafts) + lookahead
        compressed = tuple(sorted({each.every for each in rows if each.every > 1}))
        tables.append(TableLayout(lifetime, size, number, ahead, compressed))
    return CacheLayout(tuple(tables), tuple(pools))


def by_lifetime(caches: Iterable[LayerCache]) -> dict[Lifetime, list[LayerCache]]:
    """The caches of each lifetime, in the order of the tables: the kept ones first."""
    groups: dict[Lifetime, list[LayerCache]] = {}
    for each in caches:
        groups.setdefault(each.lifetime, []).append(each)
    return dict(sorted(groups.items(), key=lambda item: item[0].bounded))
