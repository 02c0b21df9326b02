"""Trust by kinds: the ledger against its definition, and the policy's draws."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from reprise.graphs import Facts, Kind
from reprise.graphs.canary import UNPROVEN_SHARE, WINDOW_SECONDS, CanaryPolicy
from reprise.graphs.trust import Ledger
from reprise.graphs.verify_mode import VerifyMode

STEP, ROW = (2, 3), (3, 2, 2)
FACTS = Facts(
    step={f"s{n}": list(map(str, range(size))) for n, size in enumerate(STEP)},
    row={f"r{n}": list(map(str, range(size))) for n, size in enumerate(ROW)},
)
GRAPHS = ("small", "middle", "large", "other")
FAMILY = {"small": 0, "middle": 0, "large": 0, "other": 1}

steps = st.tuples(*(st.integers(0, size - 1) for size in STEP))
rows = st.lists(st.tuples(*(st.integers(0, size - 1) for size in ROW)), min_size=1, max_size=4)
kinds = st.builds(
    lambda step, rows: Kind(step, np.array([FACTS.code(*each) for each in rows])), steps, rows
)
events = st.lists(
    st.one_of(
        st.tuples(st.just("prove"), st.sampled_from(GRAPHS), kinds),
        st.tuples(st.just("plan"), st.sampled_from(GRAPHS), st.lists(kinds, max_size=3)),
        st.tuples(st.just("ask"), st.sampled_from(GRAPHS), kinds),
        st.tuples(st.just("leave"), st.sampled_from(GRAPHS), st.none()),
        st.tuples(st.just("enter"), st.sampled_from(GRAPHS), st.none()),
    ),
    max_size=14,
)


def names_of(kind: Kind) -> set[tuple[int, int]]:
    """Facts and pairs, from the attributes' values themselves: of the step, of each row by itself,
    and of the step with each row; never of two rows."""
    step = [sum(STEP[:number]) + value for number, value in enumerate(kind.step)]
    found: set[tuple[int, int]] = set()
    for code in kind.rows.tolist():
        values = np.unravel_index(code, ROW)
        row = [sum(STEP) + sum(ROW[:n]) + int(value) for n, value in enumerate(values)]
        found |= set(itertools.combinations_with_replacement([*step, *row], 2))
    return found


def test_a_graph_that_takes_the_place_of_another_has_proven_nothing() -> None:
    ledger, kind = Ledger(FACTS), Kind((0, 0), np.array([0]))
    for graph, doubted in itertools.product(("small", "middle"), (False, True)):
        ledger.enter(graph, 0)
        ledger.prove(graph, kind, "live")
        assert ledger.trusts(graph, kind)
        if doubted:
            ledger.doubt(graph)
        else:
            ledger.enter(graph, 0)
        assert not ledger.trusts(graph, Kind((0, 0), np.array([0])))
        ledger.prove(graph, kind, "live")
        assert ledger.trusts(graph, kind)


@settings(max_examples=150)
@given(history=events, asked=st.lists(kinds, min_size=1, max_size=4))
def test_only_what_was_proven_is_trusted(history: Any, asked: list[Kind]) -> None:
    ledger = Ledger(FACTS)
    proven: dict[str, set[Any]] = {}
    plans: dict[int, dict[Any, set[str]]] = {0: {}, 1: {}}
    anchors: dict[int, set[str]] = {0: set(), 1: set()}

    def leave(graph: str) -> None:
        proven.pop(graph, None)
        anchors[FAMILY[graph]].discard(graph)
        for each in plans[FAMILY[graph]].values():
            each.discard(graph)

    def holds(graph: str, pair: Any) -> bool:
        if pair in proven[graph]:
            return True
        if pair[0] == pair[1] < sum(STEP):
            return False
        family = FAMILY[graph]
        witnesses = plans[family].get(pair) or anchors[family]
        return bool(witnesses) and all(pair in proven[each] for each in witnesses)

    def check(graph: str, kind: Kind) -> None:
        expected = {pair for pair in names_of(kind) if not holds(graph, pair)}
        assert ledger.missing(graph, kind) == [FACTS.name(pair) for pair in sorted(expected)]
        assert ledger.trusts(graph, kind) == (not expected)
        met = [told != "not yet met" for told in ledger.known(graph).values()]
        assert met == [holds(graph, (fact, fact)) for fact in range(len(FACTS.names))]
        candidates = proven[graph] | plans[FAMILY[graph]].keys()
        assert ledger.num_pairs(graph) == sum(holds(graph, pair) for pair in candidates)

    for what, graph, given_kinds in [("enter", each, None) for each in GRAPHS] + history:
        if what == "enter":
            leave(graph)
            ledger.enter(graph, FAMILY[graph])
            proven[graph] = set()
        elif what == "leave":
            leave(graph)
            ledger.leave(graph)
        elif graph not in proven:
            continue
        elif what == "prove":
            ledger.prove(graph, given_kinds, "live")
            proven[graph] |= names_of(given_kinds)
        elif what == "plan" and not ledger.is_anchor(graph):
            ledger.plan(graph, given_kinds)
            anchors[FAMILY[graph]].add(graph)
            for kind in given_kinds:
                for pair in names_of(kind):
                    plans[FAMILY[graph]].setdefault(pair, set()).add(graph)
        elif what == "ask":
            check(graph, given_kinds)
    for graph, kind in itertools.product(proven, asked):
        check(graph, kind)


def test_a_family_is_trusted_once_its_anchors_are() -> None:
    ledger = Ledger(FACTS)
    row = np.array([FACTS.code(1, 1, 1)])
    kind, own = Kind((0, 0), row), Kind((0, 0), np.array([FACTS.code(0, 0, 0)]))
    for graph in GRAPHS[:3]:
        ledger.enter(graph, 0)
    for anchor in ("small", "large"):
        ledger.plan(anchor, [kind])
    ledger.prove("middle", own, "start")
    ledger.prove("small", kind, "start")
    assert not ledger.trusts("middle", kind), "one anchor has not met it"
    ledger.prove("large", kind, "start")
    assert ledger.trusts("middle", kind)
    assert not ledger.trusts("middle", Kind((1, 0), row)), "a step's facts are each graph's own"
    ledger.leave("large")
    ledger.enter("large", 0)
    assert not ledger.trusts("large", kind), "a graph captured again has proven nothing"


# ---- when canaries run -------------------------------------------------------------------


def bucket(key: object = "a", replay: float = 1.0, check: float = 2.0, eager: float = 1.0) -> Any:
    info = SimpleNamespace(
        name=str(key), replay_seconds=replay, check_seconds=check, eager_seconds=eager
    )
    return SimpleNamespace(key=key, info=info, shape=SimpleNamespace(num_requests=4))


def due(policy: CanaryPolicy, count: int, which: Any = None) -> list[int]:
    which = which or bucket()
    return [number for number in range(count) if policy.is_due(which)]


@pytest.mark.parametrize("every", [2, 3, 10, 100])
def test_gaps_between_canaries_are_geometric(every: int) -> None:
    """Its mean and its share of gaps of one, each within six standard errors."""
    gaps = np.diff(due(CanaryPolicy(VerifyMode(canary=every)), 4000 * every))
    p, count = 1 / every, len(gaps)
    assert abs(gaps.mean() - every) < 6 * math.sqrt((1 - p) / p**2 / count)
    assert abs((gaps == 1).mean() - p) < 6 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("every", [2, 10, 100])
def test_every_second_replay_is_met_as_often_as_the_others(every: int) -> None:
    found = np.array(due(CanaryPolicy(VerifyMode(canary=every)), 4000 * every))
    for rhythm in (2, every):
        share = (found % rhythm == 0).mean()
        expected = 1 / rhythm
        assert abs(share - expected) < 6 * math.sqrt(expected * (1 - expected) / len(found))


def test_each_graph_has_its_own_draws() -> None:
    policy = CanaryPolicy(VerifyMode(canary=4))
    seldom, often = bucket("seldom"), bucket("often")
    found = 0
    for number in range(4000):
        policy.is_due(often)
        found += number % 10 == 0 and policy.is_due(seldom)
    assert 50 < found < 150, "a graph that runs seldom is met at its own rate"
    fresh = CanaryPolicy(VerifyMode(canary=4))
    assert due(fresh, 50, bucket("one")) != due(fresh, 50, bucket("two"))
    again = CanaryPolicy(VerifyMode(canary=4))
    assert due(again, 50, bucket("one")) == due(
        CanaryPolicy(VerifyMode(canary=4)), 50, bucket("one")
    )


@given(st.floats(1e-6, 1e-1), st.floats(1e-6, 1.0))
def test_background_canaries_cost_no_more_than_their_share(replay: float, check: float) -> None:
    policy = CanaryPolicy(VerifyMode(background=True))
    every = policy.every(bucket(replay=replay, check=check))
    assert every is not None
    assert every >= 2
    assert check / every <= 0.004 * replay * 1.000001


@pytest.mark.parametrize("mode", [VerifyMode(), VerifyMode(startup=False)])
def test_without_canaries_none_is_due_but_after_a_sibling_failed(mode: VerifyMode) -> None:
    policy = CanaryPolicy(mode)
    assert due(policy, 1000) == []
    policy.hurry([bucket()])
    assert due(policy, 1000) == [0]


def test_first_steps_of_kinds_have_a_budget_that_comes_back() -> None:
    now = 0.0
    policy, which = CanaryPolicy(VerifyMode(), clock=lambda: now), bucket(eager=0.0)
    budget = UNPROVEN_SHARE * WINDOW_SECONDS
    assert policy.may_meet(which)
    policy.met(which, 0.6 * budget)
    assert policy.may_meet(which)
    now = 10.0
    policy.met(which, 0.6 * budget)
    assert not policy.may_meet(which)
    now = WINDOW_SECONDS - 0.1
    assert not policy.may_meet(which)
    now = WINDOW_SECONDS + 0.1
    assert policy.may_meet(which)


def test_eager_steps_never_lose_more_than_the_canary_they_wait_for() -> None:
    """Without a budget: a graph's steps of unproven kinds run eagerly until they have lost what a
    comparison costs, and no step of another graph pays for it."""
    policy = CanaryPolicy(VerifyMode(), clock=lambda: 0.0)
    which, other = bucket("a", 1.0, 9.0, 3.0), bucket("b", 1.0, 9.0, 3.0)
    policy.met(which, WINDOW_SECONDS)
    for _ in range(3):  # an eager step loses 2 s, a comparison costs 6 s more than one
        assert not policy.may_meet(which)
        policy.put_off(which)
    assert policy.may_meet(which)
    assert not policy.may_meet(other)
    policy.met(which, 9.0)
    assert not policy.may_meet(which)
