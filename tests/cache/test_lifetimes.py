"""What each lifetime keeps: against a device in which every row remembers what it was made of."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from test_cache_manager import User

from reprise.cache import KEPT, NULL_BLOCK, CacheLayout, CacheManager, Lifetime, Window, one_table
from reprise.cache.layout import PoolLayout, TableLayout
from reprise.cache.spec import NEVER

LIFETIMES = [KEPT, *map(Window, (1, 2, 3, 4, 5, 8, 13, 16, 40))]


@pytest.mark.parametrize("lifetime", LIFETIMES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_what_a_lifetime_says_agrees(lifetime: Lifetime, size: int) -> None:
    def seen(begin: int, end: int) -> set[int]:
        """Blocks of the rows that tokens read and write, token by token."""
        window = lifetime.size if isinstance(lifetime, Window) else NEVER
        return {
            row // size
            for token in range(begin, end)
            for row in range(max(0, token - window + 1), token + 1)
        }

    most = 0
    for begin in range(70):
        for end in (begin + 1, begin + 2, begin + 7):
            assert set(lifetime.needed(begin, end, size)) == seen(begin, end)
        needed = lifetime.needed(begin, begin + 1, size)
        for block in range(needed.start):
            assert lifetime.leaves(block, size) <= begin
        if needed.start < needed.stop:
            assert lifetime.leaves(needed.start, size) > begin
        # One token is computed while the next one has its place already.
        most = max(most, lifetime.needed(begin + 1, begin + 2, size).stop - needed.start)
        assert lifetime.most(begin + 2, size, 2) >= len(lifetime.needed(begin, begin + 2, size)) - 1
        assert lifetime.lasting(begin) <= begin
        if begin % size == 0 and begin:
            behind = seen(begin, begin + 1) - {begin // size}
            assert set(lifetime.resumes(begin, size)) == behind
    if lifetime.bounded:
        assert lifetime.most(NEVER, size, 2) <= most + 1


def test_blocks_are_no_larger_than_a_window_bears() -> None:
    sizes = [Window(n).block_size(16, 1) for n in (1, 8, 32, 63, 64, 128, 1024, 4096)]
    assert sizes == [8, 8, 8, 8, 16, 16, 16, 16]
    assert Window(4096).block_size(128, 1) == 128
    assert Window(128).block_size(128, 1) == 32
    assert KEPT.block_size(16, 1) == 16
    assert KEPT.block_size(16, 128) == 128


def layout(*tables: tuple[Lifetime, int, int], blocks: list[int]) -> CacheLayout:
    return CacheLayout(
        tuple(TableLayout(*each) for each in tables),
        tuple(PoolLayout(1, n, f"unit {number}") for number, n in enumerate(blocks)),
    )


@dataclass
class Running:
    user: User
    computed: int
    in_flight: list[int] = field(default_factory=list)
    """How far each step under way gets it."""
    dead: bool = False

    @property
    def scheduled(self) -> int:
        return self.in_flight[-1] if self.in_flight else self.computed


class World:
    """Requests over a manager, with steps that are under way, as the scheduler has them."""

    def __init__(self, layout: CacheLayout, seed: int) -> None:
        self.cache = CacheManager(layout, enable_prefix_caching=True)
        self.random = random.Random(seed)
        self.rows: list[dict[tuple[int, int], Any]] = [{} for _ in layout.pools]
        self.running: list[Running] = []
        self.steps: list[list[Running]] = []
        self.hits = self.started = 0
        self.prefixes = [[self.random.randrange(3) for _ in range(90)] for _ in range(2)]

    def start(self) -> None:
        prefix = self.random.choice(self.prefixes)[: self.random.randrange(90)]
        tokens = [*prefix, *(self.random.randrange(3) for _ in range(self.random.randrange(1, 30)))]
        tokens = tokens[: self.cache.capacity]
        most = min(len(tokens) + self.random.randrange(1, 60), self.cache.capacity + 1)
        user = User(tokens, max_total_tokens=most)
        hit = self.cache.match(user)
        assert hit.length < len(user.token_ids)
        if self.cache.admit(user, hit):
            self.running.append(Running(user, hit.length))
            self.hits += hit.length > 0
        else:
            assert any(each.num_used for each in self.cache.pools), "one alone fits"
        self.started += 1

    def step(self) -> None:
        """Schedule some requests, and compute at once what the device would compute in order."""
        step = []
        for each in self.running:
            begin, known = each.scheduled, len(each.user.token_ids)
            if begin >= each.user.max_total_tokens - 1 or self.random.random() < 0.2:
                continue
            count = self.random.choice([1, 2, 5, 30]) if begin < known else 1
            reach = self.cache.grow(each.user, begin, min(begin + count, max(known, begin + 1)))
            if all(table.lifetime.bounded for table in self.cache.layout.tables):
                assert reach > begin or each.in_flight, "its claim is good for one token"
            if reach == begin:
                continue
            while len(each.user.token_ids) < reach:  # what the step before drew
                each.user.token_ids.append(self.random.randrange(3))
            self.compute(each, begin, reach)
            each.in_flight.append(reach)
            step.append(each)
        self.steps.append(step)
        if len(self.steps) > 1 or self.random.random() < 0.5:
            self.update()

    def compute(self, each: Running, begin: int, end: int) -> None:
        tokens = tuple(each.user.token_ids[:end])
        for blocks, table in zip(each.user.tables, self.cache.layout.tables, strict=True):
            rows, size = self.rows[table.pool], table.block_size
            for position in range(begin, end):
                block = blocks[position // size]
                assert block != NULL_BLOCK
                rows[block, position % size] = table, tokens[: position + 1]
            for number in table.lifetime.needed(begin, end, size):
                for position in range(number * size, min((number + 1) * size, end)):
                    if position <= begin - getattr(table.lifetime, "size", NEVER):
                        continue  # before the window, in the same block
                    held = rows[blocks[number], position % size]
                    assert held == (table, tokens[: position + 1])

    def update(self) -> None:
        for each in self.steps.pop(0):
            each.computed = each.in_flight.pop(0)
            if each.dead:
                if not each.in_flight:
                    self.cache.free(each.user)
                continue
            if each.computed >= each.user.commit_at:
                self.cache.commit(each.user, each.computed)
            for blocks, left, table in zip(
                each.user.tables, each.user.num_left, self.cache.layout.tables, strict=True
            ):
                needed = table.lifetime.needed(each.computed, each.computed + 1, table.block_size)
                assert left == min(needed.start, len(blocks))
                assert not any(blocks[:left])
            if each.computed >= each.user.max_total_tokens - 1 or self.random.random() < 0.05:
                self.end(each)

    def end(self, each: Running) -> None:
        self.running.remove(each)
        if each.in_flight:
            each.dead = True
        else:
            self.cache.free(each.user)

    def check(self) -> None:
        for number, pool in enumerate(self.cache.pools):
            assert pool.room >= 0
            live = [*self.running, *(each for step in self.steps for each in step if each.dead)]
            owned = {
                block
                for each in live
                for blocks, table in zip(each.user.tables, self.cache.layout.tables, strict=False)
                if table.pool == number
                for block in blocks
            } - {NULL_BLOCK}
            assert len(owned) == pool.num_used


LAYOUTS = {
    "kept": lambda: one_table(40, 4),
    "window": lambda: one_table(30, 4, Window(9)),
    "both, a pool each": lambda: layout((KEPT, 4, 0), (Window(9), 4, 1), blocks=[60, 30]),
    "both, one pool": lambda: layout((KEPT, 4, 0), (Window(9), 4, 0), blocks=[70]),
    "other sizes": lambda: layout(
        (KEPT, 8, 0), (Window(5), 2, 1), (Window(30), 4, 2), blocks=[30, 40, 30]
    ),
    "hardly any": lambda: layout((KEPT, 4, 0), (Window(9), 4, 1), blocks=[12, 5]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
@example(seed=0)
def test_every_row_that_is_read_holds_what_it_should(name: str, seed: int) -> None:
    world = World(LAYOUTS[name](), seed)
    for _ in range(120):
        if world.random.random() < 0.3:
            world.start()
        if world.running and world.random.random() < 0.05:
            world.end(world.random.choice(world.running))
        if world.random.random() < 0.02:
            world.cache.reset_prefix_cache()
        world.step()
        world.check()
    while world.steps:
        world.update()
    for each in list(world.running):
        world.end(each)
    assert world.cache.num_used == 0
    assert all(each.num_claimed == 0 for each in world.cache.pools)


@pytest.mark.parametrize("name", [each for each in LAYOUTS if each != "hardly any"])
def test_prefixes_are_found(name: str) -> None:
    """Of requests that follow each other, most go on behind what others have left."""
    world = World(LAYOUTS[name](), 3)
    for _ in range(500):
        if not world.running:
            world.start()
        world.step()
    assert world.hits > world.started / 8 > 2


def test_a_hit_needs_the_blocks_of_all_lifetimes() -> None:
    """The longest prefix for which each has its own; one block lost, and it is the next shorter."""
    cache = CacheManager(layout((KEPT, 4, 0), (Window(6), 4, 1), blocks=[30, 30]), True)
    first = User(list(range(40)), max_total_tokens=41)
    assert cache.admit(first, cache.match(first))
    for begin in range(0, 40, 8):
        assert cache.grow(first, begin, begin + 8) == begin + 8
        cache.commit(first, begin + 8)
    held = first.tables[1]
    assert held[:8] == [NULL_BLOCK] * 8
    assert all(held[8:])
    hit = cache.match(User([*range(40), 99]))
    assert hit.length == 40
    assert list(hit.tables[1]) == held
    cache.free(first)
    assert cache.match(User([*range(40), 99])).length == 40
    cache.forget_blocks([("unit 1", held[9])])
    assert cache.match(User([*range(40), 99])).length == 36
    cache.forget_blocks([("unit 0", hit.tables[0][2])])
    assert cache.match(User([*range(40), 99])).length == 8
