"""What every platform's graphs must do, and what is particular to recorded ones."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from reprise import ops
from reprise.errors import GraphError, PlatformError
from reprise.platforms import load
from reprise.platforms.accelerator import AcceleratorGraph, AcceleratorPlatform
from reprise.platforms.device_graph import (
    capturing,
    host_code,
    in_capture_pass,
    launch,
)
from reprise.platforms.recorded_graph import OpRecorder, RecordedGraph, recording
from reprise.platforms.recorded_pool import RecordedPool


@pytest.fixture
def make(platform):
    def tensor(*shape, dtype=torch.float32):
        return torch.randn(shape).to(platform.device, dtype)

    return tensor


def captured(platform, function, pool=None):
    """A graph of ``function``, which is warmed up as every capture must be."""
    with torch.inference_mode():
        with platform.capture_stream():
            function()
        graph = platform.new_graph(pool)
        graph.capture(function)
    return graph


def test_no_stream_that_is_given_out_is_the_captures(platform):
    """What is to run beside a capture would be a part of it then: another engine's work, too."""
    another = type(platform)(platform.index)
    with platform.capture_stream():
        ours = platform.current_stream()
        for each in (platform, another):
            assert all(each.stream() != ours for _ in range(100))


def test_engines_of_two_threads_capture_one_after_the_other(platform):
    """Each graph holds what its own thread has done."""
    mine, theirs = (torch.zeros(4, device=platform.device) for _ in range(2))
    begun, tried, graphs = threading.Event(), threading.Event(), {}

    def slowly() -> None:
        mine.add_(1)
        if capturing():
            begun.set()
            assert tried.wait(60)
            time.sleep(0.02)
        mine.add_(1)

    def capture() -> None:
        assert begun.wait(60)
        tried.set()
        another = type(platform)(platform.index)
        graphs["theirs"] = captured(another, lambda: theirs.add_(1))

    thread = threading.Thread(target=capture)
    thread.start()
    graphs["mine"] = captured(platform, slowly)
    thread.join(60)
    platform.synchronize()
    mine.zero_()
    theirs.zero_()
    graphs["mine"].replay()
    assert (mine.tolist(), theirs.tolist()) == ([2] * 4, [0] * 4)
    graphs["theirs"].replay()
    assert (mine.tolist(), theirs.tolist()) == ([2] * 4, [1] * 4)


class OneStream(AcceleratorPlatform):
    """A device whose module gives out one stream, whatever is asked for."""

    name = device_type = "one"

    @classmethod
    def module(cls):
        return SimpleNamespace(Stream=lambda device: "its only stream", Graph=object)


def test_a_device_of_one_stream_gives_it_out_where_nothing_is_captured():
    assert OneStream().stream() == "its only stream"


def test_a_device_of_one_stream_cannot_work_beside_a_capture(monkeypatch):
    monkeypatch.setattr(OneStream, "graph_class", "Graph")
    with pytest.raises(PlatformError, match="stream"):
        OneStream().stream()


def test_replay_computes_from_fresh_inputs_at_fixed_addresses(platform, make):
    x, weight, out = make(4, 8), make(8, 8), make(4, 8)
    runs = []

    def step():
        runs.append(1)
        out.copy_(F.silu(F.linear(x, weight)) + x)

    graph = captured(platform, step)
    count = len(runs)
    for _ in range(3):
        x.normal_()
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out, F.silu(F.linear(x, weight)) + x)
    assert len(runs) == count


def test_host_scalars_are_baked_in(platform, make):
    x, out = make(4), make(4)
    scale = [2.0]
    graph = captured(platform, lambda: out.copy_(x * scale[0]))
    scale[0] = 3.0
    graph.replay()
    torch.testing.assert_close(out, x * 2.0)


def test_a_replaced_input_is_not_seen(platform, make):
    x, out = [make(4)], make(4)
    graph = captured(platform, lambda: out.copy_(x[0] + 1))
    old = x[0]  # its memory is nobody else's: what graphs read they do not keep
    x[0] = make(4)
    graph.replay()
    torch.testing.assert_close(out, old + 1)


def test_in_place_updates_and_views_replay(platform, make):
    state, x = make(4, 6), make(2, 3)
    before = state.clone()

    def step():
        state[1:3, :3].add_(x)
        state.view(-1)[-1:].mul_(2)

    graph = captured(platform, step)
    state.copy_(before)
    for _ in range(2):
        graph.replay()
    before[1:3, :3] += 2 * x
    before[3, 5] *= 4
    torch.testing.assert_close(state, before)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("item", lambda x: x.sum().item()),
        ("bool", lambda x: bool(x.sum() > 0)),
        ("tolist", lambda x: x.tolist()),
        ("mask", lambda x: x[x > 0]),
        ("nonzero", lambda x: torch.nonzero(x)),
        ("where", lambda x: torch.where(x > 0)),
        ("equal", lambda x: torch.equal(x, x + 1)),
    ],
)
def test_capture_refuses_reads_on_the_host(platform, make, name, read):
    x, out = make(4), make(4)

    def step():
        out.copy_(x * 2)
        read(x)

    with pytest.raises((GraphError, RuntimeError)), torch.inference_mode():
        platform.new_graph().capture(step)
    assert not capturing()
    # The platform can capture again afterwards.
    graph = captured(platform, lambda: out.copy_(x * 3))
    graph.replay()
    torch.testing.assert_close(out, x * 3)


def test_graphs_share_a_pool(platform, make):
    x, out = make(64, 1024), make(64, 1024)
    pool = platform.graph_pool()

    def step(rows):
        value = x[:rows]
        for _ in range(8):
            value = torch.sin(value) + 1
        out[:rows].copy_(value)

    graphs = {
        rows: captured(platform, lambda rows=rows: step(rows), pool) for rows in (64, 32, 8, 1)
    }
    first, *rest = (each.nbytes for each in graphs.values())
    assert sum(rest) <= first
    for rows, graph in graphs.items():
        x.normal_()
        out.fill_(float("nan"))
        for memory in platform.graph_pool_memory(pool):
            memory.fill_(0xFF)
        graph.replay()
        got = out[:rows].clone()
        step(rows)
        torch.testing.assert_close(got, out[:rows])


def test_an_empty_graph_says_so(platform, make):
    x = make(4)
    graph = captured(platform, lambda: x.view(2, 2))
    assert graph.empty
    graph.replay()


def test_misuse_is_refused(platform, make):
    x = make(4)
    with pytest.raises(GraphError, match="never captured"):
        platform.new_graph().replay()
    with pytest.raises(GraphError, match="without begin"):
        platform.new_graph().end()
    graph = captured(platform, lambda: x.add_(1))
    with pytest.raises(GraphError, match="captured before"):
        graph.capture(lambda: None)

    def nested():
        platform.new_graph().begin()

    with pytest.raises(GraphError, match="already in progress"):
        platform.new_graph().capture(nested)
    assert not capturing()


def test_capture_is_visible_while_it_lasts(platform, make):
    x, seen = make(4), []

    def step():
        x.add_(1)
        seen.append((capturing(), in_capture_pass()))

    captured(platform, step)
    assert seen == [(False, False), (True, True)]
    assert not in_capture_pass()


@pytest.mark.parametrize("counted", [0, 1])
def test_an_accelerators_graph_needs_no_count_of_its_memory(monkeypatch, counted):
    class Graph:
        capture_begin = capture_end = replay = lambda self, **_: None

    class Uncounted(load("cuda")):
        graph_class = "Graph"
        calls = 0

        @classmethod
        def module(cls):
            return SimpleNamespace(Graph=Graph)

        def capture_stream(self):
            return contextlib.nullcontext()

        def memory_reserved(self):
            self.calls += 1
            if self.calls > counted:
                raise RuntimeError("the driver is gone")
            return 1 << 20

    monkeypatch.delattr(torch.accelerator, "Graph", raising=False)
    graph = AcceleratorGraph(Uncounted(), pool=None)
    graph.capture(lambda: None)
    graph.replay()
    assert graph.nbytes == 0


# ---- recorded graphs -------------------------------------------------------------------------


def record(function, pool=None):
    with torch.no_grad():
        graph = RecordedGraph(pool or RecordedPool())
        return graph, graph.capture(function)


def same_as_eager(function, inputs, out):
    graph, _ = record(function)
    for _ in range(2):
        for each in inputs:
            each.copy_(torch.randn_like(each) if each.is_floating_point() else each.flip(0))
        out.fill_(-7)
        for memory in graph.pool.memory():
            memory.fill_(0xFF)
        graph.replay()
        got = out.clone()
        function()
        assert torch.equal(got, out)
    return graph


def test_ops_of_a_transformer():
    tokens = torch.tensor([3, 1, 2, 0])
    embedding, weight = torch.randn(8, 16), torch.randn(32, 16)
    bias, gain = torch.randn(32), torch.ones(16)
    rows, out = torch.tensor([2, 0]), torch.empty(2, 16)

    def step():
        x = F.embedding(tokens, embedding)
        residual = torch.zeros_like(x)
        ops.linear_add(x, weight[:16], None, residual)
        x = ops.silu_and_mul(F.linear(x, weight, bias))
        x = ops.rms_norm(x.view(2, 2, 16).transpose(0, 1).reshape(4, 16), gain, 1e-6)
        x = torch.cat(x.chunk(2, dim=-1), dim=-1).float().contiguous()
        out.copy_(torch.index_select(x + residual, 0, rows) @ weight[:16])

    graph = same_as_eager(step, [tokens, embedding, weight, bias], out)
    assert 8 <= len(graph) <= 16


@pytest.mark.parametrize(
    "step",
    [
        lambda x, out: out.copy_(torch.arange(12).view(3, 4) + x),
        lambda x, out: out.copy_(x.new_zeros(3, 4).index_put_((torch.tensor([1]),), x[0])),
        lambda x, out: out.copy_(x.t().contiguous().t()),
        lambda x, out: torch.mul(x, 2, out=out),
        lambda x, out: out.copy_(x.max(dim=0).values + x.sort(dim=1).values),
        lambda x, out: out.copy_(torch.stack(x.unbind(0)).masked_fill(x > 0, 1.0)),
        lambda x, out: out.copy_(torch.einsum("ij,kj->ik", x, x) @ x),
        lambda x, out: out.copy_(x.expand(2, 3, 4).reshape(2, 12)[1].view(3, 4)),
        lambda x, out: out.copy_(x.topk(4, dim=1).values),
        lambda x, out: out.copy_(F.softmax(x, dim=-1)[torch.tensor([2, 0, 1])]),
    ],
)
def test_replays_equal_eager(step):
    x, out = torch.randn(3, 4), torch.empty(3, 4)
    same_as_eager(lambda: step(x, out), [x], out)


def test_intermediates_share_memory_by_their_lifetime():
    x, out = torch.randn(256, 1024), torch.empty(256, 1024)

    def step():
        value = x
        for _ in range(50):
            value = value + 1
        out.copy_(value)

    graph, _ = record(step)
    assert graph.nbytes <= 4 * x.nbytes
    graph.replay()
    assert torch.equal(out, sum([torch.ones(1)] * 50, x))


@pytest.mark.parametrize(
    "made",
    [
        lambda x: [(x * 2)[1:, ::2]],
        lambda x: [(x * 2).t()],
        lambda x: list((x * 2).unbind(1)),
        lambda x: [base := x * 2, base[1:]],
        lambda x: [(base := x * 2)[1:], base],
        lambda x: [x[:0] * 2],
    ],
)
def test_results_of_any_layout_are_as_when_they_were_computed(made):
    """At capture too, and those that share memory do in the graph's as well."""
    x, found = torch.randn(3, 4), []
    graph, _ = record(lambda: found.extend(launch(made, x)))
    for _ in range(2):
        expected = made(x)
        assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
        assert [each.stride() for each in found] == [each.stride() for each in expected]
        shared = [
            len({each.untyped_storage()._cdata for each in some}) for some in (found, expected)
        ]
        assert shared[0] == shared[1]
        x.mul_(3)
        graph.replay()


def test_values_that_live_on_after_capture_keep_their_memory():
    pool, x = RecordedPool(), torch.randn(1000)
    _, kept = record(lambda: x * 2, pool)
    record(lambda: x * 3, pool)
    assert torch.equal(kept, x * 2)
    expected = x * 2
    # And outlive their graph and its pool.
    del pool
    gc.collect()
    spare = [torch.full((1000,), 7.0) for _ in range(100)]
    assert torch.equal(kept, expected), spare


def test_an_op_is_taken_whole_and_may_read_values_when_it_runs():
    calls = []
    x, out = torch.randn(4), torch.empty(4)

    def kernel(source, target):
        calls.append(source.tolist())
        target.copy_(source * 2)

    graph, _ = record(lambda: launch(kernel, x, out))
    assert len(graph) == 1
    x.fill_(3)
    graph.replay()
    assert out.tolist() == [6.0] * 4
    assert len(calls) == 2


def test_what_a_kernel_calls_is_not_looked_at(monkeypatch):
    """Nor what is recorded of it: looking at a call of torch takes longer than the call."""
    seen = []
    x, out = torch.ones(4), torch.empty(4)
    look = OpRecorder.__torch_dispatch__

    def noted(self, func, *rest):
        seen.append(func.name())
        return look(self, func, *rest)

    monkeypatch.setattr(OpRecorder, "__torch_dispatch__", noted)
    graph, _ = record(lambda: out.copy_(launch(lambda: x * 2 + 1)))
    assert seen == ["aten::copy_"]
    x.fill_(3)
    graph.replay()
    assert out.tolist() == [7.0] * 4


def test_the_host_part_of_an_op_runs_once():
    host = []
    x, out = torch.ones(4), torch.empty(4)

    def op():
        with host_code():
            host.append(len(host) + 1)
            scale = host[-1]
            launch(lambda: out.copy_(x * scale))

    graph, _ = record(lambda: launch(op))
    graph.replay()
    assert host == [1]
    assert out.tolist() == [1.0] * 4

    def reads():
        with host_code():
            x.sum().item()

    with pytest.raises(GraphError, match="item"):
        record(lambda: launch(reads))


def test_tensors_of_other_layouts_are_refused():
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(GraphError, match="sparse"):
        record(lambda: torch.sparse.mm(sparse, torch.ones(3, 3)))


def test_a_result_whose_elements_share_memory_is_refused_at_capture():
    """A replay could not write it, and would say so when a request waits for it."""
    x, out = torch.randn(4), torch.empty(3, 4)

    def summed(x):
        return x.cumsum(0).expand(3, 4)

    with pytest.raises(GraphError, match=r"summed returns an expanded tensor \[3, 4\].*contiguous"):
        record(lambda: out.copy_(launch(summed, x)))
    same_as_eager(lambda: out.copy_(launch(lambda x: summed(x).contiguous(), x)), [x], out)
    # What host code makes of a result is no result.
    same_as_eager(lambda: out.copy_(launch(torch.cumsum, x, 0).expand(3, 4)), [x], out)


def test_ops_outside_of_a_graph_are_not_recorded():
    x = torch.ones(3)
    graph = RecordedGraph(RecordedPool())
    with recording():
        x.add_(1)
        graph.begin()
        x.add_(1)
        graph.end()
        x.add_(1)
    assert len(graph) == 1
    with pytest.raises(GraphError, match="capture_stream"):
        RecordedGraph(RecordedPool()).begin()


def test_the_pool_joins_free_neighbours():
    pool = RecordedPool()
    storages = [pool.storage(100_000) for _ in range(10)]
    taken = pool.nbytes
    storages.clear()
    whole = pool.storage(taken - 64)
    assert pool.nbytes == taken
    assert whole.nbytes() == taken - 64
