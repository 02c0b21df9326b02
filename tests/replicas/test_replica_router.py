"""Where requests go: to those that have their prefix, unless these have much more to do."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.replicas.router import ASSUMED_OUTPUT, Route, Router

SIZE = 4
MANY = 1000
"""Places of a replica, where they decide nothing."""


def prompt(name: int, blocks: int) -> list[int]:
    return [random.Random(f"{name} {each}").randrange(1000) for each in range(blocks * SIZE)]


def send(router: Router, tokens: list[int], output: int = 1, salt: bytes = b"") -> Route:
    return router.choose(tokens, salt, 1, output)


def done(router: Router, tokens: list[int], output: int = 1, salt: bytes = b"") -> int:
    route = send(router, tokens, output, salt)
    router.began(route)
    router.ended(route, [*tokens, *range(output)], salt)
    return route.replica


def test_without_anything_in_common_all_get_as_many() -> None:
    router = Router(SIZE, [1000] * 3, MANY)
    chosen = [send(router, prompt(each, 5), 8).replica for each in range(30)]
    assert [chosen.count(each) for each in range(3)] == [10] * 3
    idle = Router(SIZE, [1000] * 3, MANY)
    assert sorted(done(idle, prompt(each, 5)) for each in range(3)) == [0, 1, 2]


def test_a_prefix_calls_its_requests() -> None:
    router = Router(SIZE, [1000] * 2, MANY)
    homes = {each: done(router, prompt(each, 6)) for each in range(8)}
    assert set(homes.values()) == {0, 1}
    for each in range(8):
        route = send(router, [*prompt(each, 6), *prompt(100 + each, 1)])
        assert (route.replica, route.prompt_tokens) == (homes[each], SIZE)
        router.ended(route)


def test_a_salt_keeps_prefixes_apart() -> None:
    router = Router(SIZE, [1000] * 2, MANY)
    done(router, prompt(1, 6), salt=b"one")
    assert send(router, prompt(1, 6), salt=b"one").prompt_tokens == 0
    assert send(router, prompt(1, 6), salt=b"two").prompt_tokens == 6 * SIZE


def test_what_was_answered_is_a_prefix_too() -> None:
    router = Router(SIZE, [1000] * 2, MANY)
    done(router, prompt(2, 6))
    question = prompt(1, 1)
    answer = prompt(7, 8)
    route = send(router, question, len(answer))
    router.ended(route, [*question, *answer])
    turn = send(router, [*question, *answer, *prompt(3, 1)])
    assert turn.replica == route.replica
    # The answer's last token was not computed, so neither was its block.
    assert turn.prompt_tokens == 2 * SIZE


def test_load_says_otherwise() -> None:
    """One prefix for all: at first they go where it is, then another replica computes it too."""
    router = Router(SIZE, [1000] * 2, MANY)
    shared = prompt(1, 50)
    routes = [send(router, [*shared, *prompt(each, 1)], 64) for each in range(2, 42)]
    chosen = [each.replica for each in routes]
    assert chosen[:3] == [chosen[0]] * 3
    assert abs(chosen.count(0) - chosen.count(1)) <= 2 * len(shared) / 64
    assert sum(each.prompt_tokens >= len(shared) for each in routes) == 2, "computed once on each"


def test_who_has_no_place_left_gets_nothing_while_others_have() -> None:
    """Long requests for one, short ones for the other: as many places are taken on both before any
    request waits, whatever the loads and the prefixes say."""
    router = Router(SIZE, [1000] * 2, 4)
    shared = prompt(1, 6)
    first = send(router, shared, 200)
    short = [send(router, prompt(each, 1), 1) for each in range(2, 6)]
    assert {each.replica for each in short} == {1 - first.replica}
    rest = [send(router, prompt(each, 1), 1) for each in range(6, 9)]
    assert {each.replica for each in rest} == {first.replica}
    waiting = send(router, prompt(9, 1), 1)
    assert waiting.replica == 1 - first.replica, "all are full: load decides"
    router.ended(waiting)
    router.ended(short[0])
    assert send(router, shared, 1).replica == 1 - first.replica, "a place, and no prefix"


def test_what_a_cache_cannot_hold_is_forgotten() -> None:
    router = Router(SIZE, [10] * 1, MANY)
    done(router, prompt(1, 6))
    done(router, prompt(2, 8))
    assert send(router, prompt(2, 8)).prompt_tokens == 0
    # Of the older one the beginning is left, which is of use without its end.
    assert send(router, prompt(1, 6)).prompt_tokens == 4 * SIZE
    router.forget()
    assert send(router, prompt(2, 8)).prompt_tokens == 8 * SIZE


def test_without_a_cache_load_alone_decides() -> None:
    router = Router(0, [10] * 2, MANY)
    shared = prompt(1, 6)
    assert [send(router, shared).replica for _ in range(4)] == [0, 1, 0, 1]


@settings(max_examples=50)
@given(data=st.data())
def test_what_is_done_weighs_nothing(data: st.DataObject) -> None:
    """Requests begin, end and are left in any order: loads are those of the unfinished ones, and no
    replica is busier than another by more than prefixes and one request explain."""
    router = Router(SIZE, [data.draw(st.integers(1, 40)) for _ in range(3)], MANY)
    running: list[tuple[Route, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        step = data.draw(st.sampled_from(("send", "send", "begin", "end")))
        if step == "send":
            tokens = prompt(data.draw(st.integers(0, 3)), data.draw(st.integers(1, 6)))
            limit = data.draw(st.one_of(st.none(), st.integers(1, 400)))
            completions = data.draw(st.integers(1, 3))
            least = min(router.loads)
            route = router.choose(tokens, b"", completions, limit)
            most = completions * min(ASSUMED_OUTPUT, limit or ASSUMED_OUTPUT) + len(tokens)
            assert router.loads[route.replica] <= least + most + 2 * len(tokens)
            running.append((route, tokens))
        elif running:
            number = data.draw(st.integers(0, len(running) - 1))
            route, tokens = running[number]
            if step == "begin":
                router.began(route)
            else:
                del running[number]  # not another one that is equal
                router.ended(route, tokens)
        for index, load in enumerate(router.loads):
            mine = [each for each, _ in running if each.replica == index]
            assert load == sum(each.prompt_tokens + each.output_tokens for each in mine)
