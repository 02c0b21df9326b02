from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from reprise.cache import CacheManager, Hit, one_table
from reprise.errors import ConfigError


@dataclass
class User:
    token_ids: list[int]
    skip_prefix_cache: bool = False
    cache_salt: bytes = b""
    max_total_tokens: int = 10**6
    tables: list[list[int]] = field(default_factory=list)
    num_places: int = 0
    commit_at: int = 0
    num_left: list[int] = field(default_factory=list)
    num_indexed: list[int] = field(default_factory=list)
    checkpoints: list[Any] = field(default_factory=list)
    state_begin: int = -1
    replay: int = 0
    junction: int = 0
    block_digests: list[bytes] = field(default_factory=list)
    cache_epoch: int = 0

    @property
    def block_ids(self) -> list[int]:
        return self.tables[0] if self.tables else []


def manager(num_blocks: int, block_size: int, prefix_caching: bool) -> CacheManager:
    return CacheManager(one_table(num_blocks, block_size), prefix_caching)


def match(cache: CacheManager, user: User) -> list[int]:
    hit = cache.match(user)
    return list(hit.tables[0]) if hit.tables else []


def admit(cache: CacheManager, user: User) -> int:
    """Returns the number of cached blocks."""
    hit = cache.match(user)
    assert cache.admit(user, hit)
    return hit.length // cache.layout.tables[0].block_size


def computed(cache: CacheManager, tokens: list[int], **options: bool | bytes) -> User:
    user = User(tokens, **options)  # type: ignore[arg-type]
    admit(cache, user)
    cache.commit(user, len(tokens))
    return user


def test_blocks_cover_the_tokens_and_no_more() -> None:
    cache = manager(10, 4, True)
    user = User(list(range(4)))
    admit(cache, user)
    assert len(user.block_ids) == 1
    assert cache.grow(user, 4, 9) == 9
    assert len(user.block_ids) == 3
    assert cache.grow(user, 9, 12) == 12
    assert len(user.block_ids) == 3
    assert cache.usage == pytest.approx(3 / 9)


def test_a_request_gets_neighbouring_blocks() -> None:
    cache = manager(10, 4, True)
    user = User(list(range(8)))
    admit(cache, user)
    cache.grow(user, 8, 16)
    assert user.block_ids == [1, 2, 3, 4]


def test_all_or_nothing() -> None:
    cache = manager(4, 4, True)
    user = User(list(range(16)))
    assert not cache.admit(user, Hit())
    assert user.block_ids == []
    user = User(list(range(12)))
    assert not cache.admit(user, Hit(), reserve=[1])
    assert cache.admit(user, Hit())
    assert cache.capacity == 12


def test_growing_takes_what_there_is() -> None:
    cache = manager(4, 4, True)
    user = User(list(range(5)))
    admit(cache, user)
    assert cache.grow(user, 5, 16) == 12
    assert cache.grow(user, 12, 13) == 12
    assert len(user.block_ids) == 3


def test_full_blocks_are_shared_and_one_token_is_left_to_compute() -> None:
    cache = manager(20, 4, True)
    first = computed(cache, list(range(8)))
    assert match(cache, User(list(range(8)))) == first.block_ids[:1]
    assert match(cache, User(list(range(9)))) == first.block_ids
    assert match(cache, User([*range(7), 99, 100])) == first.block_ids[:1]
    assert match(cache, User([99, *range(1, 9)])) == []


def test_only_committed_tokens_are_shared() -> None:
    cache = manager(20, 4, True)
    user = User(list(range(12)))
    admit(cache, user)
    assert match(cache, User(list(range(12)))) == []
    cache.commit(user, 7)
    assert match(cache, User(list(range(12)))) == user.block_ids[:1]


def test_salt_and_skip_keep_requests_apart() -> None:
    cache = manager(20, 4, True)
    tokens = list(range(9))
    computed(cache, tokens)
    assert match(cache, User(tokens, cache_salt=b"other")) == []
    assert match(cache, User(tokens, skip_prefix_cache=True)) == []
    assert len(match(cache, User(tokens))) == 2


def test_switched_off() -> None:
    cache = manager(20, 4, False)
    computed(cache, list(range(9)))
    assert match(cache, User(list(range(9)))) == []


def test_prefix_survives_its_owner_and_outlives_the_tail() -> None:
    cache = manager(5, 4, True)
    user = computed(cache, list(range(16)))
    blocks = list(user.block_ids)
    cache.free(user)
    assert user.block_ids == []
    assert cache.num_used == 0
    other = User([99] * 8)
    admit(cache, other)
    assert set(other.block_ids) == set(blocks[2:])
    assert match(cache, User(list(range(16)))) == blocks[:2]


def test_cached_free_blocks_are_not_counted_twice() -> None:
    cache = manager(4, 4, True)
    cache.free(computed(cache, list(range(8))))
    # Three blocks are free, two of them those that match.
    for length, fits in ((16, False), (12, True)):
        user = User(list(range(length)))
        hit = cache.match(user)
        assert hit.length == 8
        assert cache.pools[0].num_free == 3
        assert cache.admit(user, hit) == fits
    assert cache.pools[0].num_free == 0


def test_free_keeps_the_list_that_a_step_may_still_hold() -> None:
    cache = manager(4, 4, True)
    user = computed(cache, list(range(8)))
    held = user.block_ids
    cache.free(user)
    assert len(held) == 2


def test_reset_forgets_and_blocks_computed_before_never_come_back() -> None:
    cache = manager(20, 4, True)
    running = computed(cache, list(range(8)))
    cache.reset_prefix_cache()
    assert match(cache, User(list(range(9)))) == []
    running.token_ids += range(8, 16)
    cache.grow(running, 8, 16)
    cache.commit(running, 16)
    assert match(cache, User(list(range(17)))) == []
    computed(cache, list(range(8)))
    assert len(match(cache, User(list(range(17))))) == 2


def test_lookups_are_counted() -> None:
    cache = manager(20, 4, True)
    cache.record_lookup(9, 8)
    cache.record_lookup(5, 0)
    assert (cache.prefix_queries, cache.prefix_hits) == (14, 8)


def test_block_size_is_checked() -> None:
    with pytest.raises(ConfigError, match="block_size"):
        manager(4, 0, True)
