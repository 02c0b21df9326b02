"""Facts of steps: row layouts as tables grow, and what probes write."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from reprise.cache import KEPT, STATE, CacheLayout, LayerCache, Lifetime, Rows, State, Window
from reprise.cache.layout import TableLayout, lay_out_caches
from reprise.cache.memory import PoolTensor, allocate_caches, pool_tensors
from reprise.graphs.regions import Stack, stacked
from reprise.graphs.trust import Ledger
from reprise.platforms import Platform
from reprise.runner.buffers import StepBuffers
from reprise.runner.kinds import (
    CONTEXTS,
    FACTS,
    DecodeCodes,
    RowLayouts,
    context_class,
    facts_of,
    kind_of_step,
    may_replay,
    replays_of,
)
from reprise.runner.known_step import KnownStep
from reprise.runner.probes import ProbeMaker
from reprise.runner.rows import Rows as RequestRows
from reprise.shape import StepShape

BLOCKS = 24


@given(st.lists(st.lists(st.integers(1, BLOCKS - 1), min_size=1, max_size=4), min_size=1))
def test_layouts_do_not_depend_on_how_tables_grew(parts: list[list[int]]) -> None:
    whole = [block for part in parts for block in part]
    extended, anew = RowLayouts(2), RowLayouts(2)
    for layouts in (extended, anew):
        layouts.use_cache(BLOCKS)
        layouts.extend(1, [5, 9, 10], None)  # of the request that had the row before
    last = None
    for part in parts:
        extended.extend(1, part, last)
        last = part[-1]
    anew.extend(1, whole, None)
    pairs = [b == a + 1 for a, b in itertools.pairwise(whole)]
    half = (BLOCKS + 1) // 2
    halves = {block >= half for block in whole}
    blocks = 0 if not pairs else 1 if all(pairs) else 2 if any(pairs) else 3
    expected = (blocks, 2 if len(halves) == 2 else int(halves.pop()))
    for layouts in (extended, anew):
        found = tuple(int(each[1]) for each in layouts.codes(np.arange(2)))
        assert found == expected
        assert layouts.highest == max(*whole, 10)


ROWS = Rows((1, 2), torch.float32)
CACHES = {
    "kept": [KEPT],
    "window": [Window(20)],
    "both, one pool": [KEPT, Window(600)],
    "both, a pool each": [KEPT, KEPT, Window(20)],
    "three": [KEPT, Window(20), Window(600)],
    "states": [KEPT, State(16)],
}


def make(
    platform: Platform, lifetimes: list[Lifetime], size: int, blocks: int
) -> tuple[dict[str, LayerCache], CacheLayout]:
    """Caches, a layer each, with pools of so many blocks."""
    caches = {
        f"layer {number}": LayerCache(each, key=ROWS, value=ROWS)
        for number, each in enumerate(lifetimes)
    }
    layout = lay_out_caches(caches, size)
    layout = layout.sized([blocks] * len(layout.pools))
    allocate_caches(caches, layout, platform)
    return caches, layout


@settings(max_examples=60)
@given(data=st.data())
def test_probes_fit_and_write_each_slot_once(platform: Platform, data: st.DataObject) -> None:
    """For every cache, also of a few blocks, every size of blocks, and every bucket."""
    lifetimes = data.draw(st.sampled_from([CACHES["kept"], *CACHES.values()]), label="caches")
    sizes = [1, 2, 3, 8, 16, 128] if len(lifetimes) == 1 else [1, 2, 8, 16, 128]
    size = data.draw(st.sampled_from(sizes), label="block size")
    # One request of one block fits in any case.
    least = 1 + 2 * len(lifetimes)
    blocks = data.draw(
        st.one_of(st.integers(least, least + 4), st.integers(least, 300)), label="blocks"
    )
    requests = data.draw(st.integers(1, 9), label="max_num_seqs")
    tokens = data.draw(st.integers(requests, 80), label="max_num_batched_tokens")
    caches, layout = make(platform, lifetimes, size, blocks)
    longest = data.draw(st.integers(1, min(layout.capacity, 600)), label="max_model_len")
    buffers = StepBuffers(tokens, requests, longest, layout, platform)
    buffers.use_cache(layout)
    found = listed(caches, layout)
    maker = ProbeMaker(buffers, lambda: found, vocab_size=50, max_model_len=longest)
    buckets = [StepShape.decode(n) for n in {1, requests}]
    buckets += [StepShape.mixed(n, min(n, requests)) for n in {1, min(3, tokens), tokens}]
    for bucket in buckets:
        for anchor in (True, False):
            probes = maker.probes(bucket, anchor)
            assert probes
            for probe in probes:
                check_probe(buffers, bucket, probe, longest)


def listed(
    caches: dict[str, LayerCache], layout: CacheLayout
) -> tuple[list[dict[str, PoolTensor]], list[list[Stack]]]:
    """Of each pool the caches by name, and stacked."""
    pools = pool_tensors(caches, layout)
    return pools, [stacked({k: each.tensor for k, each in pool.items()}) for pool in pools]


@given(
    tables=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(1, BLOCKS - 1), min_size=1, max_size=6)),
        min_size=1,
    )
)
def test_tables_that_are_told_at_once_are_told_as_if_one_by_one(
    tables: list[tuple[int, list[int]]],
) -> None:
    layouts, each = RowLayouts(1), RowLayouts(len(tables))
    for some in (layouts, each):
        some.use_cache(BLOCKS)
    whole, lengths = np.full((len(tables), 12), 7, dtype=np.int32), []
    for row, (left, held) in enumerate(tables):
        lengths.append(left + len(held))
        whole[row, : lengths[-1]] = [0] * left + held
        each.extend(row, held, None)
    rows = np.arange(len(tables))
    told = layouts.like(whole, np.array(lengths)).codes(rows)
    assert [x.tolist() for x in told] == [x.tolist() for x in each.codes(rows)]


def check_probe(buffers: StepBuffers, bucket: StepShape, probe: Any, longest: int) -> None:
    probe.fill()
    live, layout = probe.live, buffers.layout
    assert 1 <= live.num_requests <= bucket.num_requests
    assert live.num_tokens <= bucket.num_tokens
    views = {name: each.cpu().numpy() for name, each in buffers.views(
        bucket.num_tokens, bucket.num_requests).items()}  # fmt: skip
    starts, lengths = views["query_start_loc"], views["seq_lens"][: live.num_requests]
    assert (lengths <= longest).all()
    owners: dict[tuple[int, int], tuple[int, int]] = {}
    read: set[tuple[int, int]] = set()
    for number, table in enumerate(layout.tables):
        slots = views[f"slot_mapping{number or ''}"]
        blocks = views[f"block_tables{number or ''}"]
        assert not blocks[live.num_requests :].any(), "padding has null blocks alone"
        assert (slots[live.num_tokens :] < table.span).all()
        slots = slots[: live.num_tokens]
        assert (slots >= table.span).all(), "nobody but padding writes the null block"
        assert (slots < layout.pools[table.pool].num_blocks * table.span).all()
        if not table.lifetime.rewritten:
            assert len(np.unique(slots)) == len(slots), "no slot is written twice"
        for row in range(live.num_requests):
            new = slots[starts[row] : starts[row + 1]]
            assert 1 <= len(new) <= lengths[row]
            for block in np.unique(new // table.span).tolist():
                owner = owners.setdefault((table.pool, block), (number, row))
                assert owner == (number, row), "two rows or tables write one block"
            begin, end = int(lengths[row]) - len(new), int(lengths[row])
            needed = table.lifetime.needed(begin, end, table.block_size)
            held = blocks[row, needed.start : needed.stop]
            assert ((held > 0) & (held < layout.pools[table.pool].num_blocks)).all()
            assert not blocks[row, : needed.start].any(), "what has left is the null block"
            if not table.lifetime.rewritten:
                older = blocks[row, needed.start : begin // table.span]
                read |= {(table.pool, block) for block in older.tolist()}
    assert not read & set(owners), "what is older than the step is written by nobody in it"
    facts = buffers.known.facts
    for pair in facts.pairs(probe.kind):
        assert facts.name(pair)
    assert buffers.kind(bucket).rows.tolist() == probe.kind.rows.tolist()


def test_facts_are_told_of_each_table(platform: Platform) -> None:
    """A graph that was right on scattered blocks of one table is not trusted with the other's."""
    _, layout = make(platform, CACHES["both, one pool"], 16, 65)
    facts, other = facts_of(layout.tables), FACTS
    assert len(facts.names) == len(other.names) + 7
    assert "blocks: window of 600: scattered" in facts.names
    assert "blocks: kept: scattered" in facts.names
    one, length = np.array([1]), np.array([100])
    scattered, neighbours = np.array([3]), np.array([1])
    lower = np.array([0])

    def kind(kept: Any, window: Any) -> Any:
        layouts = [(kept, lower), (window, lower)]
        before, shape = length - one, StepShape.decode(1)
        return kind_of_step(one, before, before, layouts, shape, [16, 16], facts)

    ledger = Ledger(facts)
    ledger.enter("graph", "family")
    ledger.prove("graph", kind(scattered, neighbours), "live")
    assert ledger.trusts("graph", kind(scattered, neighbours))
    assert not ledger.trusts("graph", kind(neighbours, scattered))
    assert not ledger.trusts("graph", kind(scattered, scattered))


def test_what_a_state_replays_is_told_where_drafts_are_verified() -> None:
    """A graph that was right behind one token that counts is not trusted with several. Where only
    the device knows how many there are, each must be proven."""
    tables = [TableLayout(KEPT, 16), TableLayout(STATE, 64)]
    assert not any("replays" in each for each in facts_of(tables).names)
    assert not any("replays" in each for each in facts_of(tables[:1], 3).names)
    facts = facts_of(tables, 3)
    four, before, shape = np.array([4]), np.array([40]), StepShape.decode(1, 4)
    layouts = [(np.array([1]), np.array([0]))] * 2

    def kind(replays: Any) -> Any:
        return kind_of_step(
            four, before, before, layouts, shape, [16, 64], facts, four > 0, replays
        )  # fmt: skip

    def told(kind: Any) -> set[str]:
        names = {facts.name(each) for each in facts.pairs(kind)}
        return {each for each in names if each.startswith("replays") and " and " not in each}

    nothing, one, several = (kind(replays_of(np.array([count]))) for count in (0, 1, 4))
    assert told(nothing) == {"replays: nothing"}
    assert told(one) == {"replays: one token"}
    assert told(several) == {"replays: several"} == told(kind(replays_of(np.array([2]))))
    either = kind(may_replay(np.array([True])))
    assert told(either) == {"replays: one token", "replays: several"}
    assert told(kind(may_replay(np.array([False])))) == {"replays: nothing"}
    ledger = Ledger(facts)
    ledger.enter("graph", "family")
    ledger.prove("graph", one, "live")
    assert ledger.trusts("graph", one)
    assert not ledger.trusts("graph", either)
    ledger.prove("graph", several, "live")
    assert ledger.trusts("graph", either)


@pytest.mark.parametrize("replays", [False, True])
def test_what_drafts_without_states_replays_nothing_whatever_counts(
    platform: Platform, replays: bool
) -> None:
    """What a comparison proves is what the next such step asks for: else none is ever trusted."""
    _, layout = make(platform, CACHES["states"], 16, 65)
    standing = RequestRows(2, 8, 3, layout.tables, platform)
    known = KnownStep(standing, layout, 2000)
    rows, new = np.arange(1, 3), np.full(2, 4)
    standing.at_least[rows], standing.at_most[rows] = 20, 23
    standing.verified[rows] = True
    known.follow(rows, new, 0, replays=replays)
    shape, facts = StepShape.decode(2, 4), known.facts
    asked = facts.pairs(known.kind(shape))
    for accepted in ([1, 1], [1, 3]):
        device = np.array([25, 26]), np.array(accepted)
        names = {facts.name(each) for each in facts.pairs(known.kind(shape, device)) & asked}
        one = {"replays: one token", *(["replays: several"] * (3 in accepted))}
        expected = one if replays else {"replays: nothing"}
        found = {each for each in names if each.startswith("replays") and " and " not in each}
        assert found == expected


@given(
    least=st.integers(0, 80),
    spread=st.integers(0, 20),
    size=st.sampled_from([1, 4, 16]),
    compressed=st.sampled_from([(), (4,), (4, 128)]),
)
def test_a_step_whose_lengths_are_not_known_is_of_every_kind_that_it_may_be(
    least: int, spread: int, size: int, compressed: tuple[int, ...]
) -> None:
    facts = facts_of([TableLayout(KEPT, size, compressed=compressed)])
    counts, shape = np.array([4]), StepShape.decode(1, 4)
    layouts = [(np.array([1]), np.array([0]))]

    def codes(low: int, high: int) -> set[int]:
        bounds = np.array([low]), np.array([high])
        kind = kind_of_step(counts, *bounds, layouts, shape, [size], facts, compressed=compressed)
        return set(kind.rows.tolist())

    exact = [codes(each, each) for each in range(least, least + spread + 1)]
    assert codes(least, least + spread) >= set().union(*exact)


@settings(max_examples=30)
@given(
    starts=st.lists(st.integers(1, 280), min_size=1, max_size=3),
    accepted=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    size=st.sampled_from([1, 4, 16]),
    ahead=st.integers(0, 2),
)
def test_kinds_of_decodes_with_drafts_hold_whatever_the_step_may_be(
    platform: Platform, starts: list[int], accepted: list[int], size: int, ahead: int
) -> None:
    """However many drafts count, whatever the host knows of that, and of no class of contexts that
    the step cannot be of."""
    _, layout = make(platform, CACHES["kept"], size, 65)
    requests, width = len(starts), 4
    standing = RequestRows(requests, 8, width - 1, layout.tables, platform)
    known = KnownStep(standing, layout, 2000)
    rows, new = np.arange(1, requests + 1), np.full(requests, width)
    standing.at_least[rows] = standing.at_most[rows] = starts
    lives, none = standing.lives(rows), np.zeros(requests, dtype=np.int64)
    known.begin(rows, new, none + 1, none == 0, plain=False)
    shape, truth = StepShape.decode(requests, width), np.array(starts)
    blocks = [each.codes(rows) for each in standing.layouts]
    under_way: list[int] = []
    for count in accepted:
        kind, (least, most) = known.kind(shape), (known._least, known._most)
        assert (least <= truth).all()
        assert (truth <= most).all()
        sizes = [each.block_size for each in layout.tables]
        verifies = none == 0
        for start in {*range(int(least.min()), int(most.max()) + 1)}:
            at = np.clip(start, least, most)
            exact = kind_of_step(new, at, at, blocks, shape, sizes, known.facts, verifies)
            assert exact.step == kind.step
            assert set(exact.rows) <= set(kind.rows)
        contexts = {int(row) // 12 % CONTEXTS for row in kind.rows}
        assert contexts <= {*context_class(least + width).tolist(),
                            *context_class(most + width).tolist()}  # fmt: skip
        under_way.append(count)
        truth = truth + 1 + count
        if len(under_way) > ahead:
            oldest = none + under_way.pop(0)
            standing.settle(rows, lives, oldest, width - 1 - oldest)
        known.go_on()


@pytest.mark.parametrize("anchor", [True, False])
def test_probes_meet_ids_of_all_parts_of_the_vocabulary(platform: Platform, anchor: bool) -> None:
    caches, layout = make(platform, CACHES["kept"], 16, 65)
    buffers = StepBuffers(64, 4, 256, layout, platform)
    found = listed(caches, layout)
    maker = ProbeMaker(buffers, lambda: found, vocab_size=6400, max_model_len=256)
    seen: set[int] = set()
    for bucket in (StepShape.mixed(64, 4), StepShape.decode(4)):
        for probe in maker.probes(bucket, anchor):
            probe.fill()
            seen |= set(buffers.input_ids.device[: probe.live.num_tokens].tolist())
    assert {0, 6399} <= seen
    assert {each // 100 for each in seen} == set(range(64))


@settings(max_examples=60)
@given(
    starts=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    sizes=st.lists(st.sampled_from([1, 3, 8, 16]), min_size=1, max_size=2),
    steps=st.integers(1, 40),
    compressed=st.sampled_from([(), (4,), (4, 128)]),
)
def test_kinds_of_decodes_that_are_looked_up_are_those_that_are_found(
    starts: list[int], sizes: list[int], steps: int, compressed: tuple[int, ...]
) -> None:
    """However many steps in a row, and the same object as long as nothing changes."""
    facts = facts_of([TableLayout(KEPT, each, compressed=compressed) for each in sizes])
    known = DecodeCodes(facts, sizes, 300, compressed)
    lengths, ones = np.array(starts), np.ones(len(starts), dtype=np.int64)
    shape = StepShape.decode(len(starts))
    layouts = [(ones * (n + 1), ones * (n % 3)) for n in range(len(sizes))]
    places = [0] * len(compressed)
    blocks = [facts.code(0, 0, 0, *places, *each) for each in layouts]
    until, before = -1, None
    for step in range(steps):
        if lengths.max() + step > 300:
            break
        codes, left = known.of(lengths + step, blocks)
        told = kind_of_step(
            ones, lengths + step, lengths + step, layouts, shape, sizes, facts,
            compressed=compressed,
        ).rows  # fmt: skip
        assert codes.tolist() == told.tolist()
        if step <= until:
            assert codes.tolist() == before
        until, before = max(until, step + left), codes.tolist()


def test_what_completes_a_row_of_several_tokens_is_told_and_proven(platform: Platform) -> None:
    """A graph that is right at one place of such a row may be wrong at another one."""
    rows = {every: Rows((1, 2), torch.float32, every) for every in (4, 128)}
    caches = {"layer 0": LayerCache(KEPT, few=rows[4], many=rows[128])}
    layout = lay_out_caches(caches, 16).sized([65])
    allocate_caches(caches, layout, platform)
    buffers = StepBuffers(64, 4, 1024, layout, platform)
    buffers.use_cache(layout)
    found = listed(caches, layout)
    facts = buffers.known.facts
    names = {
        4: ["completes one", *(f"is number {number} of one" for number in (1, 2, 3))],
        128: ["completes one", "begins one", *["within one"] * 126],
    }

    def told(length: int) -> set[str]:
        ones, before = np.array([1]), np.array([length - 1])
        shape, layouts = StepShape.decode(1), [(np.array([0]), np.array([0]))]
        kind = kind_of_step(ones, before, before, layouts, shape, [128], facts, compressed=(4, 128))
        return {facts.name(each) for each in facts.pairs(kind)}

    for length in range(1, 260):
        for every in (4, 128):
            assert f"rows of {every}: {names[every][length % every]}" in told(length)
    maker = ProbeMaker(buffers, lambda: found, vocab_size=50, max_model_len=1024)
    for bucket in (StepShape.decode(4), StepShape.mixed(64, 4)):
        met = set()
        for probe in maker.probes(bucket, True):
            met |= {facts.name(each) for each in facts.pairs(probe.kind)}
        for every, places in names.items():
            for place in places:
                assert f"rows of {every}: {place}" in met, bucket
