"""Graphs of what drafts are captured when steps want them, or when nothing runs."""

from __future__ import annotations

from typing import Any

import pytest
from drafting import rate
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids

from reprise import LLM
from reprise.graphs import GraphInfo, idle
from reprise.graphs.deferred import WANTED, Deferred, split
from reprise.shape import StepShape
from reprise.testing import faults

OPTIONS: dict[str, Any] = {
    "graph_mode": "full", "graph_buckets": "decode=1,2,4,8;mixed=8,16,32,64",
    "max_num_batched_tokens": 64,
}  # fmt: skip
PROMPTS = [random_ids(60, 5), random_ids(61, 20), random_ids(62, 9)]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


def drafting(model: TinyModel, device: str, **options: Any) -> LLM:
    config = {"method": "draft_model", "model": str(model.path), "num_speculative_tokens": 3}
    return make_llm(model, device, **{**OPTIONS, **options}, speculative_config=config)


def graphs(llm: LLM, owner: str = "draft chain") -> dict[int, GraphInfo]:
    return {e.bucket: e for e in llm.graph_report().graphs if e.owner == owner}


def test_start_up_captures_the_largest_and_the_smallest(
    model: TinyModel, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        llm = drafting(model, device)
    for owner, sizes in (("draft chain", [1, 2, 4, 8]), ("draft prefill", [8, 16, 32, 64])):
        found = graphs(llm, owner)
        assert sorted(found) == sizes
        for size, each in found.items():
            waits = size not in (sizes[0], sizes[-1])
            assert (each.deferred is not None, each.executor == "none") == (waits, waits)
            assert (each.proof == "not captured yet") == waits
        told = [e for e in caplog.messages if e.startswith(f"{owner} graphs:")]
        assert "2 captured" in told[0]
        assert "2 to be captured when steps want them or nothing runs" in told[0]
    assert all(each.deferred is None for each in graphs(llm, "").values())


def test_a_bucket_that_steps_want_is_captured(model: TinyModel, device: str) -> None:
    """One step waits for it, those before run eagerly, and no token changes."""
    expected = generate(make_llm(model, device), PROMPTS[:2], greedy(60))
    llm = drafting(model, device, graph_verify="canary:1")
    owner = llm.engine.runner.owners.runners["draft chain"]
    before = owner.report().eager_steps
    assert generate(llm, PROMPTS[:2], greedy(60)) == expected
    chain = graphs(llm)
    assert chain[2].deferred is None
    assert chain[2].executor == "full"
    assert chain[2].replays > 0
    assert owner.report().eager_steps - before == WANTED
    assert chain[4].deferred is not None
    assert rate(llm) == 1
    report = llm.graph_report()
    assert not report.quarantined
    assert not report.canary_failures


def test_one_that_steps_wanted_has_canaries(model: TinyModel, device: str) -> None:
    """They are spaced by what a replay takes, which start-up has not measured."""
    llm = drafting(model, device)
    generate(llm, PROMPTS[:2], greedy(60))
    chain = graphs(llm)
    assert chain[2].canaries
    assert chain[2].canary_every is not None
    assert chain[4].canary_every is None, "it is not captured yet"


def test_the_others_are_captured_and_proven_when_nothing_runs(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "MOST_IDLE_SECONDS", 60.0)  # however slow the machine is
    expected = generate(make_llm(model, device), PROMPTS, greedy(20))
    llm = drafting(model, device)
    while llm.engine.prove_idle():
        pass
    for owner in ("draft chain", "draft prefill"):
        for each in graphs(llm, owner).values():
            assert each.deferred is None
            assert each.executor == "full"
            assert each.probes == each.planned_probes > 0
            assert each.canary_every is not None
    assert generate(llm, PROMPTS, greedy(20)) == expected
    assert rate(llm) == 1


def test_a_fault_in_one_of_them_is_found(model: TinyModel, device: str) -> None:
    """By its probes when nothing runs, or by the first live step of its kind."""
    expected = generate(make_llm(model, device), PROMPTS[:2], greedy(60))
    for rests in (True, False):
        llm = drafting(model, device)
        ours = llm.engine.runner
        with faults.inject("stale_scalar", ours.ops, "paged_attention", ours.forward_pass):
            while rests and llm.engine.prove_idle():
                pass
            assert generate(llm, PROMPTS[:2], greedy(60)) == expected
        assert graphs(llm)[2].quarantined
        assert rate(llm) == 1


def test_what_is_wanted_most_comes_first() -> None:
    shapes = [StepShape.decode(size, width) for width in (1, 4) for size in (8, 4, 2, 1)]
    now, later = split(shapes)
    assert [(each.num_requests, each.query_len) for each in now] == [(8, 1), (1, 1), (8, 4), (1, 4)]
    deferred = Deferred()
    deferred.defer(later)
    for _ in range(WANTED):
        assert deferred.take(WANTED) is None
        deferred.note(later[2])
    deferred.note(now[0])
    assert deferred.take(WANTED) == later[2]
    assert [deferred.take() for _ in range(4)] == [later[0], later[1], later[3], None]
    assert not deferred


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("verify", ["auto", "canary:1"])
def test_a_capture_that_spoils_what_requests_have_gives_no_wrong_token(
    model: TinyModel, device: str, verify: str, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured pieces have others between them, which are computed, and the graph may be wrong
    there: the cache of the target is next to that of the drafts."""
    prompts = [random_ids(60, 50), random_ids(61, 50)]
    expected = generate(make_llm(model, device), prompts, greedy(60))
    llm = drafting(model, device, graph_verify=verify, block_size=16)
    runner = llm.engine.runner
    capturer = runner.owners.runners["draft chain"].capturer
    caches = [t for each in runner.model.caches().values() for t in each.tensors.values()]
    record, spoilt = capturer._record, []

    def careless(bucket: Any, executor: Any) -> None:
        record(bucket, executor)
        spoilt.append(bucket.info.name)
        for each in caches:
            each[1:] += 1  # all blocks but the null block

    if idle:
        assert generate(llm, prompts[:1], greedy(2)) == [expected[0][:2]]
    monkeypatch.setattr(capturer, "_record", careless)
    while idle and llm.engine.prove_idle():
        pass
    assert generate(llm, prompts, greedy(60)) == expected
    assert spoilt
    refused = [each for each in llm.graph_report().quarantined if each.owner == "draft chain"]
    assert {each.name for each in refused} == set(spoilt)
    assert all("capture: it changed" in str(each.quarantined) for each in refused)


def test_a_capture_that_is_cut_short(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, once it has changed what is written at start and never again."""
    expected = generate(make_llm(model, device), PROMPTS[:2], greedy(60))
    llm = drafting(model, device, graph_verify="canary:1")
    owner = llm.engine.runner.owners.runners["draft chain"]
    memory = llm.engine.runner.forward_pass.memory()
    record, pool = owner.capturer._record, owner.capturer.pool.handle

    def interrupted(bucket: Any, executor: Any) -> None:
        record(bucket, executor)
        memory["block_sizes"].tensor.mul_(2)
        memory["model.layers.0.self_attn.q_norm.weight"].tensor.neg_()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner.capturer, "_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(llm, PROMPTS[:2], greedy(60))
    assert owner.capturer.pool.handle is None is not pool
    assert generate(llm, PROMPTS[:2], greedy(60)) == expected
    assert "q_norm" in str(graphs(llm)[2].quarantined)


def test_what_cannot_be_looked_at_is_not_captured(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(make_llm(model, device), PROMPTS[:2], greedy(60))
    llm = drafting(model, device)
    owner = llm.engine.runner.owners.runners["draft chain"]

    def short(scope: Any) -> Any:
        raise MemoryError("no room for sums")

    monkeypatch.setattr(owner.guard, "before", short)
    assert generate(llm, PROMPTS[:2], greedy(60)) == expected
    assert graphs(llm)[2].executor == "none"
    assert "no room for sums" in str(graphs(llm)[2].dropped)
