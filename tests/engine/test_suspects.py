"""Which tokens are suspect when a graph is found wrong that has been replayed unseen."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from helpers import TinyModel, TinyModels, greedy, make_llm, random_ids

from reprise import LLM
from reprise.graphs.segments import SegmentedGraph
from reprise.request import Request

PROMPT = random_ids(6, 73)
"""64 tokens of it are computed by the wrong graph, the rest by a right one."""


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture
def llm(model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The graph of 64 tokens writes wrong keys, which its third replay shows."""
    llm = make_llm(
        model, device, max_num_seqs=4, max_num_batched_tokens=64, block_size=8,
        graph_mode="decode=none,mixed=full", graph_buckets="mixed=16,64", graph_verify="startup",
    )  # fmt: skip
    graphs, forward_pass = llm.engine.runner.graphs, llm.engine.runner.forward_pass
    large = graphs.bucket_graphs["mixed", 0, 64]
    wrong = large.graph
    monkeypatch.setattr(
        graphs.canary, "is_due", lambda bucket: bucket is large and bucket.info.replays == 3
    )
    monkeypatch.setattr(graphs.ledger, "trusts", lambda *asked: True)
    buffers, cache = forward_pass._buffers, forward_pass._caches["layer 0"]
    replay = SegmentedGraph.replay

    def spoil_keys(self: SegmentedGraph) -> None:
        replay(self)
        if self is wrong:
            cache.tensors["key"].flatten(0, 1)[buffers.slots[0, :64]] *= -1

    monkeypatch.setattr(SegmentedGraph, "replay", spoil_keys)
    return llm


def until(llm: LLM, group: Any, tokens: int) -> None:
    while group.completions[0].request.num_output_tokens < tokens:
        llm.engine.step()


def finish(llm: LLM) -> None:
    while llm.engine.has_work:
        llm.engine.step()
    assert llm.graph_report().canary_failures == 1


def fill(llm: LLM, name: str, seed: int) -> Any:
    """A request whose prompt the wrong graph computes, alone in its step or beside a decode."""
    return llm.engine.add(name, random_ids(seed, 63), greedy(2))


def test_of_a_request_whose_prompt_it_computed_in_part(model: TinyModel, llm: LLM) -> None:
    running = llm.engine.add("running", PROMPT, greedy(24))
    until(llm, running, 4)
    fill(llm, "second", 7)
    until(llm, running, 8)
    fill(llm, "third", 8)
    finish(llm)
    output = running.output()
    assert output.metrics.num_preemptions == 1
    assert output.suspect_from == 0
    assert not model.is_greedy(PROMPT, output.outputs[0].token_ids[:8]), "they are wrong"


def test_of_a_request_that_found_what_it_computed(model: TinyModel, llm: LLM) -> None:
    llm.engine.add("first", [*PROMPT[:64]], greedy(2))
    while llm.engine.has_work:
        llm.engine.step()
    sharing = llm.engine.add("sharing", PROMPT, greedy(24))
    until(llm, sharing, 4)
    assert sharing.output().metrics.num_cached_tokens == 64
    fill(llm, "second", 7)
    until(llm, sharing, 8)
    fill(llm, "third", 8)
    finish(llm)
    output = sharing.output()
    assert output.suspect_from == 0
    assert not model.is_greedy(PROMPT, output.outputs[0].token_ids[:8]), "they are wrong"


def test_of_one_that_ran_before_it_did(model: TinyModel, llm: LLM) -> None:
    """Tokens that were drawn before the graph ran are right."""
    earlier = llm.engine.add("earlier", PROMPT[:9], greedy(30))
    until(llm, earlier, 5)
    for number in range(3):
        fill(llm, f"{number}", 7 + number)
        until(llm, earlier, 8 + 4 * number)
    finish(llm)
    output = earlier.output()
    assert output.suspect_from in (5, 6)
    assert model.is_greedy(PROMPT[:9], output.outputs[0].token_ids[:5])


def test_of_one_that_came_behind_the_verdict(model: TinyModel, llm: LLM) -> None:
    for number in range(3):
        fill(llm, f"{number}", 7 + number)
        while llm.engine.has_work:
            llm.engine.step()
    later = llm.engine.add("later", PROMPT, greedy(24))
    finish(llm)
    output = later.output()
    assert output.suspect_from is None
    assert model.is_greedy(PROMPT, output.outputs[0].token_ids)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_no_tokens_are_kept_of_requests_that_have_ended(
    model: TinyModel, device: str, mode: str
) -> None:
    llm = make_llm(model, device, graph_mode=mode)
    *gone, last = [random_ids(seed, 20) for seed in range(90, 93)]
    for prompt in (*gone, last):
        llm.generate(prompt, greedy(4), use_tqdm=False)
    gc.collect()
    requests = [each for each in gc.get_objects() if isinstance(each, Request)]
    assert not [each for each in requests if each.prompt_token_ids in gone]
