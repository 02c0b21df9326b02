"""Facts of steps: row layouts as tables grow, and what probes write."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from reprise.cache import KEPT, LayerCache, Rows
from reprise.platforms import Platform
from reprise.runner.buffers import StepBuffers
from reprise.runner.kinds import FACTS, RowLayouts
from reprise.runner.probes import ProbeMaker
from reprise.shape import StepShape

BLOCKS = 24


@given(st.lists(st.lists(st.integers(1, BLOCKS - 1), min_size=1, max_size=4), min_size=1))
def test_layouts_do_not_depend_on_how_tables_grew(parts: list[list[int]]) -> None:
    whole = [block for part in parts for block in part]
    extended, appended, anew = (RowLayouts(2) for _ in range(3))
    for layouts in (extended, appended, anew):
        layouts.use_cache(BLOCKS)
        layouts.extend(1, [5, 9, 10], None)  # of the request that had the row before
    last = None
    for part in parts:
        extended.extend(1, part, last)
        for block in part:
            appended.append(1, block, last)
            last = block
    anew.extend(1, whole, None)
    pairs = [b == a + 1 for a, b in itertools.pairwise(whole)]
    half = (BLOCKS + 1) // 2
    halves = {block >= half for block in whole}
    blocks = 0 if not pairs else 1 if all(pairs) else 2 if any(pairs) else 3
    expected = (blocks, 2 if len(halves) == 2 else int(halves.pop()))
    for layouts in (extended, appended, anew):
        found = tuple(int(each[1]) for each in layouts.codes(np.arange(2)))
        assert found == expected
        assert layouts.highest == max(*whole, 10)


def make_cache(blocks: int, size: int, device: Any) -> LayerCache:
    rows = Rows((1, 2), torch.float32)
    cache = LayerCache(KEPT, key=rows, value=rows)
    key, value = torch.zeros(2, blocks, size, 1, 2, device=device)
    cache.bind(0, {"key": key, "value": value})
    return cache


@settings(max_examples=60)
@given(data=st.data())
def test_probes_fit_and_write_each_slot_once(platform: Platform, data: st.DataObject) -> None:
    """For every cache, also of a few blocks, every size of blocks, and every bucket."""
    size = data.draw(st.sampled_from([1, 2, 3, 8, 16, 128]), label="block size")
    blocks = data.draw(st.one_of(st.integers(2, 6), st.integers(2, 300)), label="blocks")
    longest = data.draw(st.integers(1, min((blocks - 1) * size, 600)), label="max_model_len")
    requests = data.draw(st.integers(1, 9), label="max_num_seqs")
    tokens = data.draw(st.integers(requests, 80), label="max_num_batched_tokens")
    columns = -(-longest // size)
    buffers = StepBuffers(tokens, requests, columns, size, platform)
    cache = make_cache(blocks, size, platform.device)
    maker = ProbeMaker(
        buffers, {"layer 0": cache}, vocab_size=50, max_model_len=longest, num_blocks=blocks
    )  # fmt: skip
    buckets = [StepShape.decode(n) for n in {1, requests}]
    buckets += [StepShape.mixed(n, min(n, requests)) for n in {1, min(3, tokens), tokens}]
    for bucket in buckets:
        for anchor in (True, False):
            probes = maker.probes(bucket, anchor)
            assert probes
            for probe in probes:
                check_probe(buffers, bucket, probe, blocks, longest)


def check_probe(
    buffers: StepBuffers, bucket: StepShape, probe: Any, blocks: int, longest: int
) -> None:
    probe.fill()
    live, size = probe.live, buffers.block_size
    assert 1 <= live.num_requests <= bucket.num_requests
    assert live.num_tokens <= bucket.num_tokens
    views = {name: each.cpu().numpy() for name, each in buffers.views(
        bucket.num_tokens, bucket.num_requests).items()}  # fmt: skip
    slots = views["slot_mapping"][: live.num_tokens]
    assert len(np.unique(slots)) == len(slots), "no slot is written twice"
    assert (slots >= size).all(), "nobody but padding writes the null block"
    assert (slots < blocks * size).all()
    assert (views["slot_mapping"][live.num_tokens :] < size).all()
    starts, lengths = views["query_start_loc"], views["seq_lens"][: live.num_requests]
    assert (lengths <= longest).all()
    owners: dict[int, int] = {}
    for row in range(live.num_requests):
        new = slots[starts[row] : starts[row + 1]]
        assert 1 <= len(new) <= lengths[row]
        for block in np.unique(new // size).tolist():
            assert owners.setdefault(block, row) == row, "two rows write one block"
        table = views["block_tables"][row, : -(-lengths[row] // size)]
        assert ((table > 0) & (table < blocks)).all()
    for pair in FACTS.pairs(probe.kind):
        assert FACTS.name(pair)


@pytest.mark.parametrize("anchor", [True, False])
def test_probes_meet_ids_of_all_parts_of_the_vocabulary(platform: Platform, anchor: bool) -> None:
    buffers = StepBuffers(64, 4, 16, 16, platform)
    caches = {"layer 0": make_cache(65, 16, platform.device)}
    maker = ProbeMaker(buffers, caches, vocab_size=6400, max_model_len=256, num_blocks=65)
    seen: set[int] = set()
    for bucket in (StepShape.mixed(64, 4), StepShape.decode(4)):
        for probe in maker.probes(bucket, anchor):
            probe.fill()
            seen |= set(buffers.input_ids.device[: probe.live.num_tokens].tolist())
    assert {0, 6399} <= seen
    assert {each // 100 for each in seen} == set(range(64))
