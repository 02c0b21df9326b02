from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprise.cache import NULL_BLOCK, BlockPool, PrefixIndex
from reprise.errors import CapacityError, ConfigError


def test_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    with pytest.raises(RuntimeError, match="null block"):
        pool.free([NULL_BLOCK])
    with pytest.raises(RuntimeError, match="null block"):
        pool.share([NULL_BLOCK])


@pytest.mark.parametrize("num_blocks", [-1, 0, 1])
def test_too_few_blocks(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match="num_blocks"):
        BlockPool(num_blocks)


def test_all_or_nothing() -> None:
    pool = BlockPool(4)
    with pytest.raises(CapacityError):
        pool.allocate(4)
    assert pool.num_free == 3
    assert pool.allocate(0) == []


def test_double_free() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.free([block])
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.free([block])
    assert pool.num_free == 3


def test_shared_block_is_free_after_its_last_owner() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.free([block])
    assert (pool.ref_count(block), pool.num_used) == (1, 1)
    pool.free([block])
    assert pool.is_free(block)


def test_neighbour_is_preferred() -> None:
    pool = BlockPool(10)
    blocks = pool.allocate(9)
    pool.free([7, 3, 5])  # 5 was freed last and is first in line
    assert pool.allocate(1, after=2) == [3]
    assert pool.allocate(2, after=6) == [7, 5]
    assert pool.num_free == 0
    assert sorted(blocks) == list(range(1, 10))


def test_neighbour_behind_the_last_block() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    pool.free([1])
    assert pool.allocate(1, after=2) == [1]


def test_cached_content_is_evicted_last_and_oldest_first() -> None:
    index = PrefixIndex()
    pool = BlockPool(6, index)
    pool.allocate(5)
    for block in (1, 2, 3):
        index.insert(bytes([block]), block)
    pool.free([2, 1, 4, 3, 5])
    # 4 and 5 hold nothing; although 1 is a neighbour of none, it holds content.
    assert sorted(pool.allocate(2)) == [4, 5]
    assert [index.find(bytes([block])) for block in (1, 2, 3)] == [1, 2, 3]
    assert pool.allocate(1) == [2]
    assert index.find(bytes([2])) is None
    assert pool.allocate(2) == [1, 3]
    assert len(index) == 0


def test_cached_neighbour_is_left_alone() -> None:
    index = PrefixIndex()
    pool = BlockPool(4, index)
    pool.allocate(3)
    index.insert(b"two", 2)
    pool.free([2, 3])
    assert pool.allocate(1, after=1) == [3]


def test_revived_block_keeps_its_content() -> None:
    index = PrefixIndex()
    pool = BlockPool(4, index)
    (block,) = pool.allocate(1)
    index.insert(b"x", block)
    pool.free([block])
    pool.share([block])
    assert (pool.ref_count(block), pool.num_free) == (1, 2)
    assert block not in pool.allocate(2)
    assert index.find(b"x") == block


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60))
def test_counts_add_up_in_any_life(actions: list[tuple[int, int]]) -> None:
    index = PrefixIndex()
    pool = BlockPool(8, index)
    owned: list[int] = []
    digests = 0
    for kind, number in actions:
        if kind == 0 and number <= pool.num_free:
            taken = pool.allocate(number, after=owned[-1] if owned else None)
            assert not set(taken) & set(owned)
            assert not any(block in index for block in taken)
            owned += taken
        elif kind == 1 and owned:
            pool.free([owned.pop(number % len(owned))])
        elif kind == 2 and owned:
            owned.append(owned[number % len(owned)])
            pool.share([owned[-1]])
        elif kind == 3 and owned and owned[-1] not in index:
            digests += 1
            index.insert(digests.to_bytes(4, "big"), owned[-1])
        owners = Counter(owned)
        assert all(pool.ref_count(block) == owners[block] for block in range(8))
        assert pool.num_used == len(owners)
        assert pool.num_free == 7 - len(owners)
