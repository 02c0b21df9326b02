"""Start-up of graphs when something beside the graphs themselves fails."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from toy import Toy

from reprise.graphs import judge
from reprise.graphs.verdict import Verdict
from reprise.graphs.verify import examine, examine_later
from reprise.shape import StepShape

WAIT = 20
"""Seconds; ranks that meet need a hundredth of it."""


@pytest.mark.parametrize("what", ["fill", "graph_pool_memory"])
def test_a_probe_that_cannot_be_made_refuses_the_graph(toy, make_runner, monkeypatch, what):
    def fail(*_):
        raise ValueError("no such block")

    if what == "fill":
        probes = toy.probes
        toy.probes = lambda *what, **anchor: [
            replace(each, fill=fail) for each in probes(*what, **anchor)
        ]
    else:
        monkeypatch.setattr(type(toy.platform), "graph_pool_memory", fail)
    runner = make_runner(toy, "full", decode=(2,), mixed=())
    runner.captures.capture_all()
    (info,) = runner.report().graphs
    assert (info.executor, info.verified) == ("none", False)
    assert "cannot be made: ValueError: no such block" in info.quarantined
    toy.fill(StepShape.decode(2), 1)
    assert torch.equal(runner.run(StepShape.decode(2)), toy.eager(StepShape.decode(2)))


class Ranks:
    """Two ranks in threads: a vote and a collective wait for both, and fail if one never comes."""

    def __init__(self):
        self.barrier = threading.Barrier(2)
        self.lock = threading.Lock()
        self.votes = []

    size = 2

    def largest(self, value):
        return value

    def all(self, ok):
        with self.lock:
            self.votes.append(ok)
        self.barrier.wait(WAIT)
        verdict = all(self.votes[-2:])
        self.barrier.wait(WAIT)
        return verdict

    def fell_out(self, reason):
        pass

    def collective(self):
        self.barrier.wait(WAIT)


@pytest.mark.parametrize("failing", ["graph_pool", "pad", "eager pass", "fill"])
def test_a_rank_that_fails_leaves_no_other_waiting(platform, make_runner, monkeypatch, failing):
    """Wherever one rank raises at start-up, both get the same executors and both end."""
    if platform.asynchronous:
        pytest.skip("two threads cannot capture on one device at the same time")
    ranks = Ranks()
    toys = [Toy(platform) for _ in range(2)]
    broken = toys[1]
    runners = [
        make_runner(toy, "full", decode=(2,), mixed=(), agreement=ranks, used={}) for toy in toys
    ]

    def fail(*_):
        raise ValueError("only here")

    for toy in toys:
        model = toy.model

        def computes(batch, model=model):
            ranks.collective()
            return model(batch)

        computes.layers = model.layers
        toy.model = computes
    if failing == "graph_pool":

        class Broken(type(platform)):
            graph_pool = fail

        runners[1].capturer.pool._platform = Broken()
    elif failing == "pad":
        broken.pad = fail
    elif failing == "eager pass":
        forward, calls = broken.forward, []

        def forward_once(shape, model):
            forward(shape, model)
            calls.append(shape)
            if len(calls) == 1:
                fail()

        broken.forward = forward_once
    else:
        probes = broken.probes
        broken.probes = lambda *what, **anchor: [
            replace(each, fill=fail) for each in probes(*what, **anchor)
        ]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(each.captures.capture_all) for each in runners]:
            done.result(2 * WAIT)
    mine, other = (each.report().graphs[0] for each in runners)
    assert mine.executor == other.executor != "full"
    assert "another rank" in mine.quarantined
    assert "only here" in other.quarantined


@pytest.mark.parametrize("failing", ["pad", "forward"])
def test_a_rank_that_cannot_compute_padding_says_so(platform, make_runner, monkeypatch, failing):
    """What a comparison computes before its probe may fail as anything of it may."""
    if platform.asynchronous:
        pytest.skip("two threads cannot capture on one device at the same time")
    ranks = Ranks()
    toys = [Toy(platform) for _ in range(2)]
    runners = [
        make_runner(toy, "full", decode=(2,), mixed=(), agreement=ranks, used={}) for toy in toys
    ]
    forward = Toy.forward

    def in_step(toy, shape, model):
        ranks.collective()
        forward(toy, shape, model)

    def fail(*_):
        raise torch.OutOfMemoryError("only here")

    def compared(runner):
        (bucket,) = runner.bucket_graphs.values()
        (probe, *_) = bucket.probes
        with runner.capturer.ready():
            return runner.judge.compare(bucket, probe, cold=True)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(each.captures.capture_all) for each in runners]:
            done.result(2 * WAIT)
        monkeypatch.setattr(Toy, "forward", in_step)
        monkeypatch.setattr(toys[1], failing, fail if failing == "pad" else lambda *what: (
            in_step(toys[1], *what), fail()
        ))  # fmt: skip
        verdicts = [each.result(2 * WAIT) for each in [pool.submit(compared, e) for e in runners]]
    assert not any(each.ran for each in verdicts)
    assert "another rank" in verdicts[0].error
    assert "only here" in verdicts[1].error


@pytest.mark.parametrize("wrong_at", [0, 1, 2])
@pytest.mark.parametrize(("sizes", "which"), [((2,), 0), ((1, 2), 1), ((1, 2, 3, 4), 1)])
def test_a_graph_that_serves_has_met_each_probe_itself(
    toy, make_runner, monkeypatch, wrong_at, sizes, which
):
    """Comparisons overlap: that of the next probe is under way when a graph is refused, and what it
    finds is not about the fallback."""
    met = {}

    def note(graph, number):
        met.setdefault(id(graph), set()).add(number)

    def probes(bucket, anchor, make=toy.probes):
        def fill(number, each):
            toy.number = number
            each.fill()

        return [
            replace(each, fill=partial(fill, number, each))
            for number, each in enumerate(2 * make(bucket, anchor))
        ]

    def later(computation, guard, graph, *rest, **more):
        note(graph, toy.number)
        found = examine_later(computation, guard, graph, *rest, **more)
        if graph is refused() and toy.number == wrong_at:
            found.right = lambda: False
        return found

    def now(computation, guard, graph, *rest, **more):
        note(graph, toy.number)
        if graph is refused() and toy.number == wrong_at:
            return Verdict(error="wrong here")
        return examine(computation, guard, graph, *rest, **more)

    def refused():
        bucket = sorted(runner.bucket_graphs.values(), key=lambda each: each.shape.num_tokens)[
            which
        ]
        return bucket.graph if bucket.info.executor == "full" else None

    monkeypatch.setattr(toy, "probes", probes)
    monkeypatch.setattr(judge, "examine_later", later)
    monkeypatch.setattr(judge, "examine", now)
    runner = make_runner(toy, "full", decode=sizes, mixed=())
    kept = []  # so that no graph has the address of another
    capture = runner.capturer.capture_or_fall_back

    def keep(bucket, executor):
        capture(bucket, executor)
        kept.append(bucket.graph)

    monkeypatch.setattr(runner.capturer, "capture_or_fall_back", keep)
    runner.captures.capture_all()
    assert [each.executor for each in runner.report().graphs].count("breakable") == 1
    for bucket in runner.bucket_graphs.values():
        assert bucket.info.verified
        assert met[id(bucket.graph)] == {0, 1, 2, 3}, bucket.info.name


def test_what_an_interruption_left_under_way_says_nothing_of_later_graphs(toy, make_runner):
    """A comparison that was submitted would else vouch for the next graph of its bucket, and keep
    the memory of its own."""
    runner = make_runner(toy, "full", decode=(2,), mixed=())

    def interrupt(what, done, total):
        if what == "verify graphs":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.captures.capture_all(interrupt)
    (bucket,) = runner.bucket_graphs.values()
    graph = weakref.ref(bucket.graph)
    del bucket
    runner.captures.discard()
    gc.collect()
    assert graph() is None


def test_a_graph_whose_further_probes_cannot_be_made_runs_before_no_other(toy, make_runner):
    def probes(bucket, anchor, make=toy.probes):
        if anchor and bucket.phase == "decode":
            raise ValueError("no such block")
        return make(bucket, anchor)

    toy.probes = probes
    runner = make_runner(toy, decode=(1,), mixed=(16,))
    runner.captures.capture_all()
    proof = {each.phase: (each.probes, each.planned_probes) for each in runner.report().graphs}
    assert proof["mixed"] == (2, 2)
