from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from toy import MAX_LEN, Toy

from reprise.errors import GraphError
from reprise.graphs.owners import GraphOwners
from reprise.ops import all_ops
from reprise.shape import StepShape

STEPS = [
    *(StepShape.decode(n) for n in (1, 2, 3, 4)),
    *(StepShape.mixed(n, m) for n, m in ((1, 1), (16, 4), (20, 3), (32, 8))),
]


def padded(runner, toy, shape, seed):
    """Outputs and caches of eager execution at the bucket's size; the state is put back."""
    toy.fill(shape, seed)
    caches = [each for layer in toy.model.layers for each in (layer.key_cache, layer.value_cache)]
    before = [each.clone() for each in caches]
    bucket = runner.bucket_graphs.holding(shape).shape
    toy.pad(shape, bucket)
    hidden = toy.eager(bucket)[: shape.num_tokens]
    after = [each[1:].clone() for each in caches]
    for cache, values in zip(caches, before, strict=True):
        cache.copy_(values)
    return hidden, after, [each[1:] for each in caches]


def executor_for(runner, shape):
    """What would run a step of this shape."""
    bucket = runner.bucket_graphs.holding(shape)
    return "none" if bucket is None or bucket.graph is None else bucket.info.executor


@pytest.mark.parametrize(
    "plan", ["full", "breakable", "decode=full,mixed=breakable", "mixed=full,decode=breakable"]
)
def test_every_step_equals_eager(toy, make_runner, plan):
    runner = make_runner(toy, plan)
    runner.captures.capture_all()
    for seed, shape in enumerate(STEPS * 2):
        hidden, after, caches = padded(runner, toy, shape, seed)
        assert torch.equal(runner.run(shape), hidden)
        assert all(torch.equal(a, b) for a, b in zip(caches, after, strict=True))
    report = runner.report()
    assert report.replays == 2 * len(STEPS)
    assert report.eager_steps == 0
    assert all(each.verified and each.quarantined is None for each in report.graphs)
    assert report.blind_inputs == []


def test_decode_steps_with_several_tokens_a_request(toy, make_runner):
    runner = make_runner(toy, "full", query_lens=(1, 4))
    runner.captures.capture_all()
    for shape in (StepShape.decode(2, 4), StepShape.decode(3, 4), StepShape.decode(3)):
        hidden, _, _ = padded(runner, toy, shape, 1)
        assert torch.equal(runner.run(shape), hidden)
    assert executor_for(runner, StepShape.decode(2, 2)) == "none"
    assert {each.query_len for each in runner.report().graphs if each.phase == "decode"} == {1, 4}


def test_steps_above_the_largest_bucket_run_eagerly(toy, make_runner):
    runner = make_runner(toy, "full")
    runner.captures.capture_all()
    for shape in (StepShape.decode(5), StepShape.mixed(40, 2)):
        toy.fill(shape, 3)
        expected = toy.eager(shape)
        assert torch.equal(runner.run(shape), expected)
        assert executor_for(runner, shape) == "none"
    assert runner.report().eager_steps == 2


def test_replays_do_not_run_the_models_python(toy, make_runner):
    runner = make_runner(toy, "breakable")
    runner.captures.capture_all()
    forwards = toy.forwards
    toy.fill(StepShape.decode(4), 1)
    for _ in range(5):
        runner.run(StepShape.decode(4))
    assert toy.forwards == forwards


def test_nothing_is_captured_without_a_plan(toy, make_runner):
    runner = make_runner(toy, "none")
    runner.captures.capture_all()
    toy.fill(StepShape.decode(2), 1)
    runner.run(StepShape.decode(2))
    report = runner.report()
    assert report.graphs == []
    assert report.eager_steps == 1
    assert toy.forwards == 1


def test_capture_goes_from_large_to_small_and_reports_progress(toy, make_runner):
    seen = []
    runner = make_runner(toy, "full")
    runner.captures.capture_all(lambda *what: seen.append(what))
    sizes = [each.num_tokens for each in runner.captures.shapes]
    assert sizes == sorted(sizes, reverse=True)
    assert seen[0] == ("capture graphs", 1, 5)
    assert seen[4:6] == [("capture graphs", 5, 5), ("verify graphs", 1, 5)]


def test_capture_and_verification_leave_the_state_alone(toy, make_runner):
    toy.fill(StepShape.decode(8), 4)
    layer = toy.model.layers[0]
    before = layer.key_cache.clone()
    fill, toy.fill = toy.fill, lambda *args, **more: None
    runner = make_runner(toy, "full")
    runner.captures.capture_all()
    toy.fill = fill
    assert torch.equal(layer.key_cache[1:], before[1:])


def test_the_report_is_plain_data(toy, make_runner):
    runner = make_runner(toy, "decode=full,mixed=breakable", decode=(2,), mixed=(16,))
    runner.captures.capture_all()
    report = json.loads(json.dumps(runner.report().to_dict()))
    assert report["plan"] == {"decode": "full", "mixed": "breakable"}
    mixed, decode = report["graphs"]
    assert (mixed["phase"], mixed["bucket"], mixed["executor"]) == ("mixed", 16, "breakable")
    assert (mixed["segments"], mixed["breaks"]) == (3, 2)
    assert (decode["segments"], decode["verified"], decode["quarantined"]) == (1, True, None)
    assert decode["probes"] == 2
    assert report["verify"] == "startup"


def test_downgrades_are_reported_and_logged(toy, make_runner, caplog):
    (chosen, *_) = toy.ops.candidates["paged_attention"]
    toy.ops.candidates["paged_attention"] = [
        dataclasses.replace(chosen, name="decoding", graph_support="single_token_decode")
    ]
    runner = make_runner(toy, "full", query_lens=(1, 2))
    (decode, mixed) = runner.report().downgrades
    assert decode["reason"].startswith("paged_attention (decoding)")
    assert (mixed["wanted"], mixed["got"]) == ("full", "breakable")
    assert len([each for each in caplog.records if "graph plan" in each.message]) == 2


def test_the_plan_follows_what_computes_the_calls_of_each_phase(toy, make_runner):
    (chosen, *_) = toy.ops.candidates["paged_attention"]
    decoding = dataclasses.replace(
        chosen, name="decoding", graph_support="single_token_decode",
        accepts=lambda query_len, **_:
            None if query_len == 1 else "it takes one new token a request",
    )  # fmt: skip
    reference = all_ops()["paged_attention"].implementations["reference"]
    toy.ops.candidates["paged_attention"] = [decoding, reference]
    runner = make_runner(toy, "full")
    # The reference can never be captured, but no decode step calls it.
    assert (runner.plan.decode, runner.plan.mixed) == ("full", "breakable")
    (mixed,) = runner.plan.downgrades
    assert mixed.reason.startswith("paged_attention (reference)")
    runner.captures.capture_all()
    for shape in (StepShape.decode(3), StepShape.mixed(10, 3)):
        toy.fill(shape, 7)
        expected = toy.eager(shape)
        assert executor_for(runner, shape) != "none"
        torch.testing.assert_close(runner.run(shape), expected)
    names = {
        each.implementation.name for each in toy.ops.choices["paged_attention"].answers.values()
    }
    assert names == {"decoding", "reference"}


def test_verification_can_be_off(toy, make_runner):
    runner = make_runner(toy, "full", verify="off")
    runner.captures.capture_all()
    assert not any(each.verified for each in runner.report().graphs)
    assert executor_for(runner, StepShape.decode(2)) == "full"


def test_every_graph_gets_a_probe_and_more_only_within_the_budget(toy, make_runner, monkeypatch):
    monkeypatch.setattr("reprise.graphs.prove.VERIFY_SECONDS", 0.0)
    monkeypatch.setattr("reprise.graphs.prove.VERIFY_SHARE", 0.0)
    runner = make_runner(toy, "full")
    runner.captures.capture_all()
    assert [each.probes for each in runner.report().graphs] == [1] * 5
    assert not any(each.verified for each in runner.report().graphs)
    assert {each.proof for each in runner.report().graphs} == {"partly proven (1 of 2 probes)"}


def test_probes_that_leave_an_input_unchanged_prove_nothing(toy, make_runner, caplog):
    """Of its phase; graphs of the other one are proven."""
    inputs = toy.inputs

    def more(shape):
        extra = {"extra": toy.hidden[:0]} if shape.phase == "decode" else {}
        return {**inputs(shape), **extra}

    toy.inputs = more
    runner = make_runner(toy, "full")
    runner.captures.capture_all()
    report = runner.report()
    assert report.blind_inputs == ["decode: extra"]
    assert "decode: extra" in caplog.text
    for each in report.graphs:
        assert each.verified == (each.phase == "mixed")
        if each.phase == "decode":
            assert each.proof == "not proven"
            assert set(each.facts.values()) == {"not yet met"}


def test_they_prove_nothing_of_graphs_that_are_captured_later_either(toy, make_runner):
    inputs = toy.inputs
    toy.inputs = lambda shape: {**inputs(shape), "extra": toy.hidden[:0]}
    runner = make_runner(toy, "full", mixed=(), lazy=True)
    runner.captures.capture_all()
    assert len(runner.captures.deferred) == 1
    while runner.captures.prove_more():
        pass
    assert not runner.captures.deferred
    for each in runner.report().graphs:
        assert each.proof == "not proven"
        assert set(each.facts.values()) == {"not yet met"}


# ---- failures --------------------------------------------------------------------------------


def test_a_forward_that_no_graph_can_hold_runs_eagerly(toy, make_runner, caplog):
    model = toy.model

    def reads_lengths(batch):
        return model(batch) * (1 if batch.seq_lens.sum().item() > 0 else 0)

    toy.model = reads_lengths
    reads_lengths.layers = model.layers
    runner = make_runner(toy, "full", decode=(2,), mixed=())
    runner.captures.capture_all()
    (info,) = runner.report().graphs
    assert info.executor == "none"
    assert "full: capture failed" in info.quarantined
    assert "breakable: capture failed" in info.quarantined
    assert "quarantined" in caplog.text
    toy.fill(StepShape.decode(2), 1)
    expected = toy.eager(StepShape.decode(2))
    assert torch.equal(runner.run(StepShape.decode(2)), expected)


@pytest.mark.parametrize(
    ("votes", "why"),
    [
        *(({n}, "capture failed on another rank") for n in (1, 2, 3)),
        # Submitted, and then made step by step, behind padding.
        ({4, 5}, "padding cannot be computed on another rank"),
        ({4, 6}, "padding cannot be computed on another rank"),
        ({4, 7}, "made: on another rank"),
        ({5, 10}, "wrong on another rank"),
        ({6, 11}, "wrong on another rank"),
        ({6}, "wrong now and then"),
    ],
)
def test_ranks_agree_on_every_verdict(toy, make_runner, votes, why):
    """Another rank that finds the graphs wrong makes this one fall back with it."""
    asked = []

    class Votes:
        size = 2

        def largest(self, value):
            return value

        def all(self, ok):
            asked.append(ok)
            return ok and len(asked) not in votes

        def fell_out(self, reason):
            pass

    runner = make_runner(toy, "full", decode=(2,), mixed=(), agreement=Votes())
    runner.captures.capture_all()
    (info,) = runner.report().graphs
    assert info.executor == "breakable", info.quarantined
    assert why in info.quarantined
    assert all(asked)


def test_many_failures_are_not_many_warnings(toy, make_runner, caplog):
    original = toy.ops.functions["rms_norm"]
    toy.ops.functions["rms_norm"] = lambda x, *rest: (_ for _ in ()).throw(GraphError("never"))
    runner = make_runner(toy, "breakable", decode=range(1, 9), used={})
    with caplog.at_level(logging.WARNING):
        runner.captures.capture_all()
    assert len(runner.report().quarantined) == 10
    assert len([each for each in caplog.records if "decode[" in each.getMessage()]) == 3
    toy.ops.functions["rms_norm"] = original


# ---- canary ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["full", "breakable"])
def test_the_canary_sees_no_ghosts(toy, make_runner, plan):
    runner = make_runner(toy, plan, verify="canary:3")
    runner.captures.capture_all()
    for seed in range(60):
        shape = STEPS[seed % len(STEPS)]
        hidden, after, caches = padded(runner, toy, shape, seed)
        assert torch.equal(runner.run(shape), hidden)
        assert all(torch.equal(a, b) for a, b in zip(caches, after, strict=True))
    report = runner.report()
    assert 10 < report.canaries < 50
    assert report.canary_failures == 0
    assert report.replays == 60


@pytest.mark.parametrize(
    ("verify", "ranks", "first"),
    [
        ("canary:2", (1,), {"eager", "replay"}),
        ("canary:1", (1,), {"eager"}),
        ("canary:2", (2,), {"eager"}),
        ("canary:2", (1, 2), {"eager"}),  # a draft's, of an engine of several
    ],
)
def test_what_a_canary_computes_first(toy, make_runner, verify, ranks, first):
    """A replay that comes first may cost the step its result, which several ranks could not tell
    alike, and of which none may be where every step is compared."""

    class Ranks:
        alike = True

        def __init__(self, size):
            self.size = size

        def largest(self, value):
            return value

        def all(self, ok):
            return ok

        def fell_out(self, reason):
            pass

    runner, *others = (
        make_runner(toy, verify=verify, decode=(2,), mixed=(), agreement=Ranks(size))
        for size in ranks
    )
    GraphOwners({str(n): each for n, each in enumerate([runner, *others])})
    runner.captures.capture_all()
    toy.refills_cache = False  # else blocks change between two steps
    shape, seen = StepShape.decode(2), []
    graph = runner.bucket_graphs.holding(shape).graph
    replay = graph.replay

    def noted():
        seen.append("replay")
        replay()

    graph.replay = noted
    toy.model.register_forward_pre_hook(lambda *_: seen.append("eager"))
    found = []
    for seed in range(40):
        toy.fill(shape, seed)
        seen.clear()
        runner.run(shape)
        if "eager" in seen:
            found.append(seen[0])
    assert len(found) > 5
    assert set(found) == first
    assert runner.report().canary_failures == 0


def test_the_canary_catches_a_graph_that_goes_bad_while_serving(toy, make_runner, caplog):
    runner = make_runner(toy, "full", verify="canary:2", decode=(2, 4), mixed=())
    runner.captures.capture_all()
    bucket = runner.bucket_graphs.holding(StepShape.decode(2))
    replay = bucket.graph.replay

    def broken():
        replay()
        toy.hidden[0].neg_()

    bucket.graph.replay = broken
    for seed in range(100):
        hidden, after, caches = padded(runner, toy, StepShape.decode(2), seed)
        right = torch.equal(runner.run(StepShape.decode(2)), hidden)
        assert all(torch.equal(a, b) for a, b in zip(caches, after, strict=True))
        if runner.report().canary_failures:
            break
        assert not right
    assert right, "what leaves is the eager result"
    report = runner.report()
    assert report.canary_failures == 1
    (bad,) = report.quarantined
    assert (bad.bucket, bad.executor) == (2, "none")
    assert "canary: hidden differs in 64 of 128 elements" in bad.quarantined
    assert "canary" in caplog.text
    assert executor_for(runner, StepShape.decode(4)) == "full"


def test_contexts_reach_the_longest(toy):
    toy.fill(StepShape.decode(8), 1)
    assert int(toy.seq_lens.max()) == MAX_LEN
    assert isinstance(toy, Toy)
