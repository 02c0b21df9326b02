"""Graphs are proven further while no request runs, and no request can tell."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TinyModel, TinyModels, assert_idle, generate, greedy, make_llm, random_ids
from planted import OPTIONS, make_oracle, planted, serve, wrong_tokens
from recurrent import hybrids

from reprise import LLM, SamplingParams
from reprise.cache.memory import pool_tensors
from reprise.config import EngineConfig
from reprise.engine.thread import EngineThread
from reprise.graphs import idle, judge, prove, trust, verify
from reprise.graphs.segments import SegmentedGraph
from reprise.graphs.step_memory import StepMemory
from reprise.testing import faults


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture
def busy_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start-up has time for the first probe of each graph alone, and any is short enough later."""
    monkeypatch.setattr(prove, "VERIFY_SECONDS", 0.0)
    monkeypatch.setattr(prove, "VERIFY_SHARE", 0.0)
    monkeypatch.setattr(idle, "MOST_IDLE_SECONDS", 60.0)


def prove_all(llm: LLM) -> int:
    count = 0
    while llm.engine.prove_idle():
        count += 1
    return count


def touched(llm: LLM) -> dict[str, torch.Tensor]:
    """Copies of all cache blocks in which requests may have left something."""
    forward_pass = llm.engine.runner.forward_pass
    pools = pool_tensors(forward_pass._caches, forward_pass._layout)
    counts = llm.engine.runner.buffers.touched_blocks()
    assert all(count > 1 for count in counts)
    return {
        name: each.tensor[:count].clone()
        for pool, count in zip(pools, counts, strict=True)
        for name, each in pool.items()
    }


@pytest.mark.usefixtures("busy_start")
@pytest.mark.parametrize("mode", ["full", "breakable"])
def test_all_probes_run_while_nothing_else_does(
    model: TinyModel, device: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reprise")
    llm = make_llm(model, device, **OPTIONS, graph_mode=mode)
    graphs = llm.graph_report().graphs
    assert all(each.probes == 1 for each in graphs)
    assert not any(each.verified for each in graphs)
    lacking = sum(each.planned_probes - each.probes for each in graphs)
    assert prove_all(llm) == lacking > len(graphs)
    report = llm.graph_report()
    assert all(each.verified for each in report.graphs)
    assert all(each.probes == each.planned_probes for each in report.graphs)
    assert report.canaries == report.canary_failures == report.replays == 0
    assert caplog.text.count("are verified, while no request ran") == 1
    assert not llm.engine.prove_idle()


@pytest.mark.usefixtures("busy_start")
@pytest.mark.parametrize("when", ["start", "idle"])
def test_what_each_graph_alone_proves_comes_before_further_probes_of_anchors(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Most steps have padding. On a host half as fast those of graphs that are no anchors came too
    late, and their first steps were compared one after the other."""
    order: list[tuple[int, bool, str]] = []
    ledger_prove = trust.Ledger.prove

    def noted(self: Any, graph: Any, kind: Any, source: Any) -> None:
        info = next(e.info for e in buckets if e.key == graph)
        order.append((info.probes, not self.is_anchor(graph), info.name))
        ledger_prove(self, graph, kind, source)

    buckets: list[Any] = []
    begin = prove.Prover.begin
    monkeypatch.setattr(
        prove.Prover, "begin", lambda self, given: [buckets.extend(given), begin(self, given)]
    )
    monkeypatch.setattr(trust.Ledger, "prove", noted)
    if when == "start":
        monkeypatch.setattr(prove, "VERIFY_SECONDS", 60.0)
    llm = make_llm(
        model, device, **{**OPTIONS, "graph_buckets": "decode=2,4,8,16,32", "max_num_seqs": 32},
        graph_mode="decode=full,mixed=none",
    )  # fmt: skip
    at_start = len(order)
    prove_all(llm)
    assert all(each.verified for each in llm.graph_report().graphs)
    assert (at_start == len(order)) == (when == "start")
    further = order[len(buckets) :]
    rounds = [each[:2] for each in further]
    assert rounds == sorted(rounds)
    assert {name for _, other, name in further if other}, "some are no anchors"


@pytest.mark.usefixtures("busy_start")
@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_what_requests_have_left_in_the_cache_stays_to_the_bit(
    model: TinyModel, device: str, kind: str
) -> None:
    """Between any two requests: prefixes are found as before, and give the same tokens."""
    options = {**OPTIONS, "num_blocks": 120, "graph_mode": "full", "graph_verify": "startup"}
    with hybrids() if kind == "recurrent" else contextlib.nullcontext():
        llm = make_llm(model, device, **options)
        eager = make_llm(model, device, **{**options, "graph_mode": "none"})
        prompts = [random_ids(80 + n, 60) for n in range(4)]
        expected = generate(eager, prompts, greedy(9))
        assert generate(llm, prompts, greedy(9)) == expected
        proven = hits = 0
        for prompt, tokens in zip(prompts * 2, expected * 2, strict=True):
            for _ in range(3):
                before = touched(llm)
                proven += llm.engine.prove_idle()
                after = touched(llm)
                assert all(torch.equal(each, after[name]) for name, each in before.items())
            (output,) = llm.generate([{"prompt_token_ids": prompt}], greedy(9), use_tqdm=False)
            assert list(output.outputs[0].token_ids) == tokens
            hits += (output.num_cached_tokens or 0) >= 32
            assert_idle(llm)
        # A state has few checkpoints, which later requests replace.
        assert hits == 8 if kind == "attention" else hits > 0
        assert proven > 10
        assert llm.graph_report().canary_failures == 0


@pytest.mark.usefixtures("busy_start")
@pytest.mark.parametrize(
    ("fault", "op"),
    [
        (faults.WrongThreeOfFour, "paged_attention"),
        pytest.param(faults.WrongUpperHalf, "rotary_cache", marks=pytest.mark.long),
        (faults.CacheOverrun, "rotary_cache"),
        pytest.param(faults.PaddingWritesLive, "rotary_cache", marks=pytest.mark.long),
        (faults.ChangedWeight, "rotary_cache"),
    ],
)
def test_a_fault_that_begins_after_start_is_found_before_a_request_meets_it(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, fault: Any, op: str
) -> None:
    expected = make_oracle(model, device)()
    with planted(monkeypatch, fault, op, active=False) as broken:
        llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify="startup")
        broken[-1].active.fill_(True)
        prove_all(llm)
        report = llm.graph_report()
        assert report.canary_failures > 0
        assert all("probe '" in (each.quarantined or "") for each in report.quarantined)
        assert wrong_tokens(serve(llm), expected) == 0


@pytest.mark.usefixtures("busy_start")
@pytest.mark.parametrize("harm", ["spoils", "raises", "spoils what is kept"])
def test_what_another_graph_does_that_is_replayed_first(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """It was right at start. What is compared comes behind it, and would find nothing."""
    llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify="canary:1")
    prompt = {"prompt_token_ids": random_ids(97, 60)}
    first = llm.generate([prompt], greedy(9), use_tqdm=False)[0].outputs[0].token_ids
    memory = llm.engine.runner.forward_pass.memory()
    caches = [each.tensor[1:] for each in memory.values() if each.owner == "cache"]
    kept: list[dict[str, torch.Tensor]] = []
    state = StepMemory.state
    monkeypatch.setattr(StepMemory, "state", lambda self: kept.append(state(self)) or kept[-1])
    replay, replayed = SegmentedGraph.replay, []

    def go_wrong(self: SegmentedGraph) -> None:
        replay(self)
        replayed.append(self)
        if len(replayed) == 1:
            for each in kept[0].values() if harm == "spoils what is kept" else caches:
                each.add_(1)
            if harm == "raises":
                raise RuntimeError("the replay failed")

    monkeypatch.setattr(SegmentedGraph, "replay", go_wrong)
    graphs = dict(llm.engine.runner.graphs.bucket_graphs)
    names = {id(each.graph): each.info.name for each in graphs.values()}
    assert llm.engine.prove_idle()
    monkeypatch.undo()
    wrong = names[id(replayed[0])]
    assert [each.name for each in llm.graph_report().quarantined] == [wrong]
    (output,) = llm.generate([prompt], greedy(9), use_tqdm=False)
    assert output.outputs[0].token_ids == first


@pytest.mark.usefixtures("busy_start")
def test_nothing_is_proven_while_a_request_runs(model: TinyModel, device: str) -> None:
    llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify="startup")
    engine = llm.engine
    probes = sum(each.probes for each in llm.graph_report().graphs)
    engine.add("a", {"prompt_token_ids": random_ids(90, 30)}, greedy(8))
    while engine.has_work:
        assert not engine.prove_idle()
        engine.step()
    assert sum(each.probes for each in llm.graph_report().graphs) == probes
    assert engine.prove_idle()


@pytest.mark.usefixtures("busy_start")
def test_a_probe_that_lacks_memory_refuses_no_graph_and_is_not_tried_for_ever(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def examine(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify="startup")
    graphs = len(llm.graph_report().graphs)
    monkeypatch.setattr(judge, "examine", examine)
    assert prove_all(llm) == graphs
    report = llm.graph_report()
    assert not report.quarantined
    assert all(each.executor == "full" and each.probes == 1 for each in report.graphs)


def test_long_comparisons_wait_for_no_idle_moment(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, busy_start: None
) -> None:
    monkeypatch.setattr(idle, "MOST_IDLE_SECONDS", 0.0)
    llm = make_llm(model, device, **OPTIONS, graph_mode="full")
    assert not llm.engine.prove_idle()


def test_modes_that_prove_nothing_prove_nothing_while_idle(model: TinyModel, device: str) -> None:
    for options in ({"graph_mode": "none"}, {"graph_mode": "full", "graph_verify": "off"}):
        assert not make_llm(model, device, **OPTIONS, **options).engine.prove_idle()


class Reader:
    texts = None
    wants_more = True

    def __init__(self, done: Callable[[list[int]], None]) -> None:
        self._done = done
        self._tokens: list[int] = []

    def accepted(self, group: Any) -> None: ...

    def put(self, delta: Any) -> None:
        self._tokens += delta.outputs[0].token_ids
        if delta.finished:
            self._done(self._tokens)

    def fail(self, error: Exception) -> None:
        self._done([])


@pytest.mark.usefixtures("busy_start")
def test_the_engines_thread_proves_between_requests(model: TinyModel, device: str) -> None:
    """A request that comes in the midst is served at once, and gets its tokens."""
    config = EngineConfig(
        model=str(model.path), device=device, dtype="float32", skip_tokenizer_init=True,
        graph_mode="full", **OPTIONS,
    )  # fmt: skip
    thread = EngineThread(config, lambda readers: None)
    try:
        graphs = thread.engine.runner.graphs
        results: list[list[int]] = []
        prompt, params = random_ids(95, 20), SamplingParams(temperature=0, max_tokens=6)
        for number in range(200):
            reader = Reader(results.append)
            thread.submit(str(number), lambda: {"prompt_token_ids": prompt}, params, 0, reader)
            deadline = time.monotonic() + 60
            while len(results) <= number and time.monotonic() < deadline:
                time.sleep(0.002)
            assert model.is_greedy(prompt, results[number])
            if all(each.verified for each in graphs.report().graphs):
                break
            time.sleep(0.1)  # some probes
        assert all(each.verified for each in graphs.report().graphs)
        assert graphs.report().canary_failures == 0
    finally:
        thread.shutdown()


def test_a_proof_that_fails_ends_no_thread(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(
        model=str(model.path), device=device, dtype="float32", skip_tokenizer_init=True, **OPTIONS
    )
    asked = []

    def prove_idle(self: Any, wanted: Any) -> bool:
        asked.append(time.monotonic())
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("reprise.engine.engine.Engine.prove_idle", prove_idle)
    thread = EngineThread(config, lambda readers: None)
    try:
        deadline = time.monotonic() + 30
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(asked) == 1  # and not again before something has changed
        assert thread.call(lambda: 5).result(timeout=30) == 5
    finally:
        thread.shutdown()


@pytest.mark.usefixtures("busy_start")
@pytest.mark.parametrize("mode", ["full", "breakable"])
def test_a_comparison_is_given_up_for_who_waits_and_made_another_time(
    model: TinyModel, device: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is, up to its replay: what that has done has to be looked at."""
    options = {**OPTIONS, "num_blocks": 120, "graph_mode": mode, "graph_verify": "startup"}
    llm = make_llm(model, device, **options)
    eager = make_llm(model, device, **{**options, "graph_mode": "none"})
    prompts = [random_ids(80 + n, 60) for n in range(4)]
    expected = generate(eager, prompts, greedy(9))
    assert generate(llm, prompts, greedy(9)) == expected
    replayed: list[Any] = []
    replay = verify._Both._replay
    monkeypatch.setattr(
        verify._Both, "_replay",
        lambda self, *args, **options: [replayed.append(self), replay(self, *args, **options)],
    )  # fmt: skip
    before, given_up = touched(llm), 0
    for number in range(40):  # of the question
        asked: list[bool] = []

        def wanted(number: int = number, asked: list[bool] = asked) -> bool:
            assert not replayed
            asked.append(True)
            return len(asked) > number % 4

        proven = sum(each.probes for each in llm.graph_report().graphs)
        more = llm.engine.prove_idle(wanted)
        now = sum(each.probes for each in llm.graph_report().graphs)
        assert more == (now > proven or not replayed)
        given_up += not replayed
        assert (now == proven) == (not replayed)
        replayed.clear()
        after = touched(llm)
        assert all(torch.equal(each, after[name]) for name, each in before.items())
    assert given_up > 20
    prove_all(llm)
    report = llm.graph_report()
    assert all(each.verified for each in report.graphs)
    assert report.canary_failures == 0
    assert generate(llm, prompts, greedy(9)) == expected
    assert_idle(llm)


def test_who_comes_while_a_graph_is_compared_is_seen(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(
        model=str(model.path), device=device, dtype="float32", skip_tokenizer_init=True, **OPTIONS
    )
    begun, seen = threading.Event(), threading.Event()

    def prove_idle(self: Any, wanted: Callable[[], bool]) -> bool:
        assert not wanted()
        begun.set()
        deadline = time.monotonic() + 30
        while not wanted() and time.monotonic() < deadline:
            time.sleep(0.001)
        if wanted():
            seen.set()
        return False

    monkeypatch.setattr("reprise.engine.engine.Engine.prove_idle", prove_idle)
    thread = EngineThread(config, lambda readers: None)
    try:
        assert begun.wait(30)
        assert thread.call(lambda: 5).result(timeout=60) == 5
        assert seen.is_set()
    finally:
        thread.shutdown()
