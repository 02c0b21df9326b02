from __future__ import annotations

import pytest
from toy import Toy

from reprise.graphs import Buckets, GraphRunner, parse_plan, predict
from reprise.platforms import MemoryInfo, load

GIB = 1 << 30


class Measuring(load("cpu")):
    """A device of 8 GiB whose graphs take memory that it reports truly."""

    graph_memory = "measure"
    taken = 0
    nodes = 1 << 16

    def new_graph(self, pool=None):
        graph = super().new_graph(pool)
        end = graph._end

        def counting():
            end()
            type(self).taken += graph.nbytes + self.nodes

        graph._end = counting
        return graph

    def empty_cache(self):
        type(self).settled = True

    def memory_info(self):
        return MemoryInfo(free=8 * GIB - self.taken, total=8 * GIB)


@pytest.fixture
def runner():
    Measuring.taken = 0
    platform = Measuring()
    return GraphRunner(
        Toy(platform), platform, parse_plan("decode=full,mixed=breakable"),
        Buckets((1, 2, 4, 6, 8), (16, 32, 48, 64)), 8,
    )  # fmt: skip


def test_two_buckets_a_phase_predict_the_rest(runner):
    memory = predict(runner.captures)
    assert memory.note == ""
    assert runner.bucket_graphs == {}
    before = Measuring.taken
    runner.captures.capture_all()
    actual = Measuring.taken - before
    assert memory.predicted == pytest.approx(actual, rel=0.2)
    assert runner.report().memory.actual == actual
    infos = runner.report().graphs
    assert sum(each.predicted_bytes for each in infos) == memory.predicted
    assert infos[0].predicted_bytes >= infos[0].bytes


@pytest.mark.parametrize(
    ("readings", "note"),
    [
        (lambda step: 8 * GIB, ""),
        (lambda step: 4 * GIB + step * GIB // 64, "grew"),
        (lambda step: 8 * GIB - step * GIB, "not credible"),
        (lambda step: -step * 1000 * GIB, "not credible"),
        (lambda step: 1 // 0, "measurement failed: ZeroDivisionError"),
    ],
    ids=["zero", "negative", "huge", "absurd", "failing"],
)
def test_a_lying_measurement_is_left_out(runner, readings, note, caplog):
    steps = iter(range(100))
    memory = predict(runner.captures, lambda: readings(next(steps)))
    assert note in memory.note
    assert bool(note) == ("graph memory" in caplog.text)
    runner.captures.capture_all()
    infos = runner.report().graphs
    assert all(each.verified for each in infos)
    # The allocator's own count remains, unless nothing could be measured at all.
    assert memory.predicted == (None if "failed" in note else sum(each.bytes for each in infos))


def test_no_measurement_without_need(caplog):
    platform = load("cpu")()
    for plan, note in (("none", "captures no graphs"), ("full", platform.graph_memory_reason)):
        runner = GraphRunner(Toy(platform), platform, parse_plan(plan), Buckets((1,), (16,)), 8)
        caplog.clear()
        with caplog.at_level("INFO", logger="reprise.graphs.memory"):
            memory = predict(runner.captures)
        assert memory.predicted is None
        assert note in memory.note
        assert runner.report().memory is memory
        (line,) = caplog.messages
        assert note in line


def test_where_the_driver_is_not_asked_the_allocators_count_is_reserved(runner, monkeypatch):
    monkeypatch.setattr(Measuring, "graph_memory", "skip")
    monkeypatch.setattr(Measuring, "counts_memory", True)
    monkeypatch.setattr(Measuring, "memory_info", lambda self: 1 // 0)
    memory = predict(runner.captures)
    assert memory.note == f"the driver's part is not measured: {Measuring.graph_memory_reason}"
    runner.captures.capture_all()
    assert memory.predicted == sum(each.bytes for each in runner.report().graphs) > 0
    assert memory.actual is None


@pytest.mark.parametrize("calls", range(8))
def test_memory_calls_that_fail_from_some_call_on_cost_the_numbers_alone(
    runner, monkeypatch, calls
):
    left = [calls]

    def failing(kept):
        def call(self):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("the driver is gone")
            return kept(self)

        return call

    for name in ("memory_info", "empty_cache", "memory_reserved"):
        monkeypatch.setattr(Measuring, name, failing(getattr(Measuring, name)))
    memory = predict(runner.captures)
    assert memory.failed
    assert memory.note == "measurement failed: RuntimeError: the driver is gone"
    runner.captures.capture_all()
    assert memory.actual is None
    assert memory.predicted is None
    assert all(each.verified for each in runner.report().graphs)


@pytest.mark.parametrize("name", ["rocm", "xpu"])
def test_platforms_without_a_conformance_record_do_not_ask_the_driver(name):
    platform = load(name)
    assert platform.graph_memory == "skip"
    assert platform.counts_memory
    assert platform.graph_memory_reason != load("cuda").graph_memory_reason
