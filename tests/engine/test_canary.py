"""An engine whose graphs go bad while it serves: callers are right again from the canary on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from helpers import (
    TinyModel,
    TinyModels,
    assert_idle,
    copied_inputs,
    generate,
    greedy,
    make_llm,
    random_ids,
)

from reprise import LLM
from reprise.graphs import judge
from reprise.graphs.segments import SegmentedGraph

SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """``spoil(change)``: from now on ``change(n)`` follows the n-th replay of a graph."""
    replay = SegmentedGraph.replay

    def start(change: Callable[[int], None]) -> None:
        count = 0

        def replay_and_change(self: SegmentedGraph) -> None:
            nonlocal count
            replay(self)
            count += 1
            change(count)

        monkeypatch.setattr(SegmentedGraph, "replay", replay_and_change)

    return start


@pytest.mark.parametrize("shared", [True, False], ids=["one memory", "host and device"])
@pytest.mark.parametrize("requests", [1, 2, 3])
def test_steps_after_a_refusal_continue_where_the_one_before_ended(
    model: TinyModel, device: str, monkeypatch: Any, spoil: Any, shared: bool, requests: int
) -> None:
    if shared and device != "cpu":
        pytest.skip("an accelerator has memory of its own")
    copied_inputs(monkeypatch, shared=shared)
    llm = make_llm(
        model, device, **SMALL, graph_mode="decode=full,mixed=none",
        graph_buckets="decode=1,2,4", graph_verify="canary:1",
    )  # fmt: skip
    llm.engine.pipeline.depth = 2
    logits = llm.engine.runner.forward_pass._logits
    spoil(lambda count: logits.neg_() if count == 5 else None)
    prompts = [random_ids(70 + n, 60) for n in range(requests)]
    for _ in range(2):  # the second time from the prefix cache
        for prompt, output in zip(prompts, generate(llm, prompts, greedy(40)), strict=True):
            assert model.is_greedy(prompt, output)
    assert llm.graph_report().canary_failures == 1
    assert_idle(llm)


def test_what_a_bad_graph_wrote_is_computed_again(
    model: TinyModel, device: str, monkeypatch: Any, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(
        model, device, **SMALL, graph_mode="decode=none,mixed=full",
        graph_buckets="mixed=64", graph_verify="startup",
    )  # fmt: skip
    llm.engine.pipeline.depth = 2
    graphs = llm.engine.runner.graphs
    monkeypatch.setattr(graphs.canary, "is_due", lambda bucket: bucket.info.replays == 3)
    monkeypatch.setattr(graphs.ledger, "trusts", lambda *asked: True)
    forward_pass = llm.engine.runner.forward_pass
    buffers, cache = forward_pass._buffers, forward_pass._caches["layer 0"]

    def spoil_keys(count: int) -> None:
        tokens = int(buffers.query_start_loc.device[1])
        cache.tensors["key"].flatten(0, 1)[buffers.slots[0, :tokens]] *= -1

    spoil(spoil_keys)
    bad = random_ids(5, 40)
    wrong = generate(llm, [bad], greedy(24))[0]
    assert not model.is_greedy(bad, wrong), "the fault does something"

    # Its request is under way when the third replay, of the other one, is found wrong.
    engine = llm.engine
    running = engine.add("running", random_ids(6, 40), greedy(24))
    while running.completions[0].request.num_output_tokens < 5:
        engine.step()
    with caplog.at_level(logging.WARNING):
        other = engine.add("other", random_ids(7, 40), greedy(24))
        while engine.has_work:
            engine.step()
    assert llm.graph_report().canary_failures == 1
    assert "computed again" in caplog.text
    assert running.output().metrics.num_preemptions == 1
    assert model.is_greedy(random_ids(7, 40), other.output().outputs[0].token_ids)
    # Those of steps that were under way then may be wrong.
    tokens = running.output().outputs[0].token_ids
    assert model.is_greedy([*random_ids(6, 40), *tokens[:9]], tokens[9:])

    again = llm.generate([{"prompt_token_ids": bad}], greedy(24), use_tqdm=False)[0]
    assert again.metrics.num_cached_tokens == 0
    assert model.is_greedy(bad, again.outputs[0].token_ids)
    assert_idle(llm)


@pytest.mark.parametrize("verify", ["startup", "canary:1"])
def test_a_graph_that_raises_is_refused(
    model: TinyModel, device: str, monkeypatch: Any, verify: str
) -> None:
    llm = small_llm(model, device, verify)

    def fail(self: SegmentedGraph) -> None:
        raise LookupError("no such kernel")

    monkeypatch.setattr(SegmentedGraph, "replay", fail)
    prompt = random_ids(8, 9)
    assert model.is_greedy(prompt, generate(llm, [prompt], greedy(8))[0])
    (refused,) = llm.graph_report().quarantined
    assert "LookupError: no such kernel" in refused.quarantined
    assert_idle(llm)


def test_a_fault_that_cannot_be_traced_is_refused_all_the_same(
    model: TinyModel, device: str, monkeypatch: Any, spoil: Any
) -> None:
    llm = small_llm(model, device, "canary:1")
    logits = llm.engine.runner.forward_pass._logits

    def fail(*args: Any) -> None:
        raise LookupError("no trace")

    monkeypatch.setattr(judge, "locate", fail)
    spoil(lambda count: logits.neg_() if count == 2 else None)
    prompt = random_ids(8, 9)
    assert model.is_greedy(prompt, generate(llm, [prompt], greedy(8))[0])
    (refused,) = llm.graph_report().quarantined
    assert "not traced to an op: LookupError: no trace" in refused.quarantined


def small_llm(model: TinyModel, device: str, verify: str) -> LLM:
    return make_llm(
        model, device, **SMALL, graph_mode="decode=full,mixed=none", graph_buckets="decode=1",
        graph_verify=verify,
    )  # fmt: skip


def test_what_replays_before_did_to_the_sampler_is_made_good(
    model: TinyModel, device: str, monkeypatch: Any, spoil: Any
) -> None:
    """Its parameters live as long as the same requests run, also when they are computed again."""
    llm = make_llm(
        model, device, **SMALL, graph_mode="decode=full,mixed=none", graph_buckets="decode=1",
        graph_verify="startup",
    )  # fmt: skip
    graphs, sampler = llm.engine.runner.graphs, llm.engine.runner.sampler
    monkeypatch.setattr(graphs.canary, "is_due", lambda bucket: bucket.info.replays == 6)
    monkeypatch.setattr(graphs.ledger, "trusts", lambda *asked: True)
    prompt, bias = random_ids(9, 20), {3: 0.25}
    expected = generate(make_llm(model, device, **SMALL), [prompt], greedy(30, logit_bias=bias))

    def change(count: int) -> None:
        if count in (5, 6):
            sampler._batch._bias[1].fill_(1e4 * count)

    spoil(change)
    (got,) = generate(llm, [prompt], greedy(30, logit_bias=bias))
    assert llm.graph_report().canary_failures == 1
    assert got[:4] == expected[0][:4]
    assert got != expected[0], "the fault does something"
    assert set(got[8:]) != {3}
    again = make_llm(model, device, **SMALL)
    rest = generate(again, [[*prompt, *got[:10]]], greedy(20, logit_bias=bias))
    assert got[10:] == rest[0]


def test_tokens_drawn_since_the_last_proof_are_marked(
    model: TinyModel, device: str, monkeypatch: Any, spoil: Any
) -> None:
    llm = small_llm(model, device, "startup")
    graphs = llm.engine.runner.graphs
    logits = llm.engine.runner.forward_pass._logits
    # Compared are the replays of 5 tokens and of 9: right then, and wrong.
    monkeypatch.setattr(graphs.canary, "is_due", lambda bucket: bucket.info.replays in (5, 9))
    monkeypatch.setattr(graphs.ledger, "trusts", lambda *asked: True)
    spoil(lambda count: logits.neg_() if count >= 6 else None)
    prompt = random_ids(8, 9)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], greedy(12), use_tqdm=False)
    # Token 0 came from the prompt's eager step, replay n drew token n.
    assert output.suspect_from == output.outputs[0].suspect_from == 6
    tokens = output.outputs[0].token_ids
    assert model.is_greedy(prompt, tokens[:6])
    assert not model.is_greedy(prompt, tokens[:9])
    assert model.is_greedy([*prompt, *tokens[:9]], tokens[9:])
    (later,) = llm.generate([{"prompt_token_ids": prompt}], greedy(12), use_tqdm=False)
    assert later.suspect_from is None
    assert model.is_greedy(prompt, later.outputs[0].token_ids)


def test_the_first_canary_of_a_kind_compares_the_draw(
    model: TinyModel, device: str, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An op that draws wrong is told, and its reference's token leaves."""
    llm = small_llm(model, device, "startup")
    runner = llm.engine.runner
    graphs = runner.graphs
    # Every step is the first of its kind.
    monkeypatch.setattr(graphs.ledger, "trusts", lambda *asked: False)
    monkeypatch.setattr(graphs.canary, "may_meet", lambda bucket: True)
    right = runner.ops.functions["argmax"]
    decoding = (1, model.reference.config.vocab_size)

    def wrong(logits: Any) -> Any:
        return right(logits) + 1 if logits.shape == decoding and graphs.ran.first else right(logits)

    monkeypatch.setitem(runner.ops.functions, "argmax", wrong)
    prompt = random_ids(8, 9)
    with caplog.at_level(logging.WARNING, logger="reprise"):
        assert model.is_greedy(prompt, generate(llm, [prompt], greedy(6))[0])
    assert "op argmax draws tokens" in caplog.text
