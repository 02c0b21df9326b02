from __future__ import annotations

import pytest

from reprise.cache import NO_PARENT, PrefixIndex, block_digest


def test_digest_depends_on_all_that_matters() -> None:
    base = block_digest(NO_PARENT, [1, 2])
    assert base == block_digest(NO_PARENT, (1, 2))
    others = [
        block_digest(base, [1, 2]),
        block_digest(NO_PARENT, [2, 1]),
        block_digest(NO_PARENT, [1, 2], b"salt"),
    ]
    assert len({base, *others}) == 4
    assert all(len(digest) == 16 for digest in others)


def test_token_beyond_int32() -> None:
    with pytest.raises(OverflowError):
        block_digest(NO_PARENT, [2**31])


def test_first_block_of_a_digest_stays_the_one_that_is_found() -> None:
    index = PrefixIndex()
    index.insert(b"a", 1)
    index.insert(b"a", 2)
    assert index.find(b"a") == 1
    assert 2 not in index
    index.evict(2)
    assert index.find(b"a") == 1
    index.evict(1)
    assert index.find(b"a") is None


def test_clear() -> None:
    index = PrefixIndex()
    index.insert(b"a", 1)
    index.clear()
    assert 1 not in index
    assert len(index) == 0
