from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from reprise.cache import CacheManager
from reprise.errors import ConfigError


@dataclass
class User:
    token_ids: list[int]
    skip_prefix_cache: bool = False
    cache_salt: bytes = b""
    block_ids: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    num_indexed_blocks: int = 0
    cache_epoch: int = 0


def admit(cache: CacheManager, user: User) -> int:
    """Returns the number of cached blocks."""
    cached = cache.match(user)
    assert cache.allocate(user, len(user.token_ids), cached)
    return len(cached)


def computed(cache: CacheManager, tokens: list[int], **options: bool | bytes) -> User:
    user = User(tokens, **options)  # type: ignore[arg-type]
    admit(cache, user)
    cache.commit(user, len(tokens))
    return user


def test_blocks_cover_the_tokens_and_no_more() -> None:
    cache = CacheManager(10, 4, True)
    user = User(list(range(9)))
    assert cache.allocate(user, 4)
    assert len(user.block_ids) == 1
    assert cache.allocate(user, 9)
    assert len(user.block_ids) == 3
    assert cache.allocate(user, 12)
    assert len(user.block_ids) == 3
    assert cache.usage == pytest.approx(3 / 9)


def test_a_request_gets_neighbouring_blocks() -> None:
    cache = CacheManager(10, 4, True)
    user = User(list(range(16)))
    cache.allocate(user, 8)
    cache.allocate(user, 16)
    assert user.block_ids == [1, 2, 3, 4]


def test_all_or_nothing() -> None:
    cache = CacheManager(4, 4, True)
    user = User(list(range(16)))
    assert not cache.allocate(user, 16)
    assert user.block_ids == []
    assert not cache.allocate(user, 12, reserve=1)
    assert cache.allocate(user, 12)
    assert cache.capacity == 12


def test_full_blocks_are_shared_and_one_token_is_left_to_compute() -> None:
    cache = CacheManager(20, 4, True)
    first = computed(cache, list(range(8)))
    assert cache.match(User(list(range(8)))) == first.block_ids[:1]
    assert cache.match(User(list(range(9)))) == first.block_ids
    assert cache.match(User([*range(7), 99, 100])) == first.block_ids[:1]
    assert cache.match(User([99, *range(1, 9)])) == []


def test_only_committed_tokens_are_shared() -> None:
    cache = CacheManager(20, 4, True)
    user = User(list(range(12)))
    admit(cache, user)
    assert cache.match(User(list(range(12)))) == []
    cache.commit(user, 7)
    assert cache.match(User(list(range(12)))) == user.block_ids[:1]


def test_salt_and_skip_keep_requests_apart() -> None:
    cache = CacheManager(20, 4, True)
    tokens = list(range(9))
    computed(cache, tokens)
    assert cache.match(User(tokens, cache_salt=b"other")) == []
    assert cache.match(User(tokens, skip_prefix_cache=True)) == []
    assert len(cache.match(User(tokens))) == 2


def test_switched_off() -> None:
    cache = CacheManager(20, 4, False)
    computed(cache, list(range(9)))
    assert cache.match(User(list(range(9)))) == []


def test_prefix_survives_its_owner_and_outlives_the_tail() -> None:
    cache = CacheManager(5, 4, True)
    user = computed(cache, list(range(16)))
    blocks = list(user.block_ids)
    cache.free(user)
    assert user.block_ids == []
    assert cache.pool.num_used == 0
    other = User([99] * 8)
    cache.allocate(other, 8)
    assert set(other.block_ids) == set(blocks[2:])
    assert cache.match(User(list(range(16)))) == blocks[:2]


def test_cached_free_blocks_are_not_counted_twice() -> None:
    cache = CacheManager(4, 4, True)
    cache.free(computed(cache, list(range(8))))
    user = User(list(range(16)))
    cached = cache.match(user)
    assert len(cached) == 2
    # Three blocks are free, two of them those that matched.
    assert not cache.allocate(user, 16, cached)
    assert cache.pool.num_free == 3
    assert cache.allocate(user, 12, cached)
    assert cache.pool.num_free == 0


def test_free_keeps_the_list_that_a_step_may_still_hold() -> None:
    cache = CacheManager(4, 4, True)
    user = computed(cache, list(range(8)))
    held = user.block_ids
    cache.free(user)
    assert len(held) == 2


def test_reset_forgets_and_blocks_computed_before_never_come_back() -> None:
    cache = CacheManager(20, 4, True)
    running = computed(cache, list(range(8)))
    cache.reset_prefix_cache()
    assert cache.match(User(list(range(9)))) == []
    running.token_ids += range(8, 16)
    cache.allocate(running, 16)
    cache.commit(running, 16)
    assert cache.match(User(list(range(17)))) == []
    computed(cache, list(range(8)))
    assert len(cache.match(User(list(range(17))))) == 2


def test_lookups_are_counted() -> None:
    cache = CacheManager(20, 4, True)
    cache.record_lookup(9, 8)
    cache.record_lookup(5, 0)
    assert (cache.prefix_queries, cache.prefix_hits) == (14, 8)


def test_block_size_is_checked() -> None:
    with pytest.raises(ConfigError, match="block_size"):
        CacheManager(4, 0, True)
