from __future__ import annotations

import pytest
import torch
from toy import Toy

from reprise.errors import GraphError
from reprise.graphs import Break, Segment, SegmentedGraph
from reprise.ops.registry import intercept
from reprise.platforms.device_graph import in_capture_pass
from reprise.shape import StepShape

SPLITS = ("nowhere", "breaks", "ops", "all")


def capture(platform, toy, shape, split, pool=None):
    with torch.inference_mode(), toy.ops.activate():
        toy.pad(shape.empty, shape)
        with platform.capture_stream(), intercept(None):
            toy.forward(shape, toy.model)
        graph = SegmentedGraph(platform, pool or platform.graph_pool())
        graph.capture(lambda: toy.forward(shape, toy.model), split)
    return graph


def replayed(toy, graph, shape):
    """The replay's outputs after the pool and the outputs were overwritten."""
    for memory in toy.platform.graph_pool_memory(graph.pool):
        memory.fill_(0xFF)
    toy.hidden.fill_(float("nan"))
    with torch.inference_mode(), toy.ops.activate():
        graph.replay()
    return toy.hidden[: shape.num_tokens].clone()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "shape", [StepShape.decode(4), StepShape.decode(2, 3), StepShape.mixed(40, 3)]
)
def test_replay_equals_eager(platform, toy, shape, split):
    graph = capture(platform, toy, shape, split)
    for seed in range(3):
        toy.fill(shape, seed)
        expected = toy.eager(shape)
        assert torch.equal(replayed(toy, graph, shape), expected)


def test_segments_end_at_break_ops(platform, toy):
    graph = capture(platform, toy, StepShape.decode(2), "breaks")
    kinds = [type(each) for each in graph.steps]
    assert kinds == [Segment, Break, Segment, Break, Segment]
    assert [str(each.call) for each in graph.steps if isinstance(each, Break)] == [
        "paged_attention #0", "paged_attention #1",
    ]  # fmt: skip
    first = graph.steps[0]
    assert [str(each) for each in first.calls] == ["rms_norm #0", "rotary_cache #0"]
    whole = capture(platform, toy, StepShape.decode(2), "nowhere")
    assert (whole.num_segments, whole.num_breaks) == (1, 0)


def test_segments_without_work_are_dropped(platform, toy):
    shape = StepShape.decode(2)
    toy.fill(shape, 1)
    out = torch.empty(2, 4, 32, dtype=toy.hidden.dtype, device=toy.hidden.device)
    layer = toy.model.layers[0]

    def attention():
        torch.ops.reprise.paged_attention(
            out * 0 if first else out, layer.key_cache, layer.value_cache, toy.block_tables[:2],
            toy.seq_lens[:2], toy.query_start_loc[:3], out, 0.1, 0, 0.0, 1,
        )  # fmt: skip

    with torch.inference_mode(), toy.ops.activate():
        first = True
        attention()
        graph = SegmentedGraph(platform, platform.graph_pool())

        def forward():
            nonlocal first
            first = True
            attention()
            first = False
            attention()
            attention()

        graph.capture(forward, "breaks")
        assert [type(each) for each in graph.steps] == [Segment, Break, Break, Break]
        graph.replay()


@pytest.mark.parametrize("split", ["nowhere", "breaks"])
def test_buckets_share_memory_and_do_not_disturb_each_other(platform, split):
    toy = Toy(platform, max_requests=32, max_tokens=1024)
    pool = platform.graph_pool()
    largest, *smaller = [StepShape.mixed(n, 8) for n in (1024, 768, 512, 256, 128, 64, 32, 16)]
    graphs = {largest: capture(platform, toy, largest, split, pool)}
    first = graphs[largest].nbytes
    for shape in smaller:
        graphs[shape] = capture(platform, toy, shape, split, pool)
    for size in range(32, 0, -4):
        shape = StepShape.decode(size)
        graphs[shape] = capture(platform, toy, shape, split, pool)
    assert sum(each.nbytes for each in graphs.values()) <= 1.25 * first
    for shape in reversed(graphs):
        toy.fill(shape, shape.num_tokens)
        assert torch.equal(replayed(toy, graphs[shape], shape), toy.eager(shape))


def test_a_break_op_reads_what_the_pass_has_computed_while_it_is_captured_too(platform, toy):
    """Of lengths or addresses that a graph makes it would otherwise read what lay there before."""
    shape = StepShape.decode(2)
    toy.fill(shape, 1)
    lengths, layer = toy.seq_lens[:2].tolist(), toy.model.layers[0]
    out = torch.empty(2, 4, 32, dtype=toy.hidden.dtype, device=toy.hidden.device)
    original, seen = toy.ops.functions["paged_attention"], []

    def watched(*args, **kwargs):
        seen.append(args[4].tolist())
        original(*args, **kwargs)

    def forward():
        once, twice = toy.seq_lens[:2] - 1, toy.seq_lens[:2] - 2
        for made in (once, once, twice, twice // 2):
            torch.ops.reprise.paged_attention(
                out, layer.key_cache, layer.value_cache, toy.block_tables[:2],
                made, toy.query_start_loc[:3], out, 0.1, 0, 0.0, 1,
            )  # fmt: skip

    expected = [[each - 1 for each in lengths]] * 2
    expected += [[(each - 2) // n for each in lengths] for n in (1, 2)]
    toy.ops.functions["paged_attention"] = watched
    with torch.inference_mode(), toy.ops.activate():
        graph = SegmentedGraph(platform, platform.graph_pool())
        graph.capture(forward, "breaks")
        assert seen == expected
        graph.replay()
    assert seen == expected * 2


def test_a_break_op_must_not_return_its_output(platform, toy):
    original = toy.ops.functions["paged_attention"]

    def returning(*args, **kwargs):
        original(*args, **kwargs)
        return args[6].clone() if in_capture_pass() else None

    toy.ops.functions["paged_attention"] = returning
    with pytest.raises(GraphError, match=r"paged_attention #0: .* returned a value"):
        capture(platform, toy, StepShape.decode(2), "breaks")
    toy.ops.functions["paged_attention"] = original
    capture(platform, toy, StepShape.decode(2), "breaks")


def test_an_op_that_fails_under_capture_is_named(platform, toy):
    original = toy.ops.functions["silu_and_mul"]

    def failing(x):
        if calls:
            raise RuntimeError("no such kernel")
        return original(x)

    calls = []
    toy.ops.functions["silu_and_mul"] = failing
    with torch.inference_mode(), toy.ops.activate():
        toy.forward(StepShape.decode(2), toy.model)
        calls.append(1)
        graph = SegmentedGraph(platform, platform.graph_pool())
        with pytest.raises(GraphError, match="silu_and_mul #0: no such kernel"):
            graph.capture(lambda: toy.forward(StepShape.decode(2), toy.model), "breaks")
