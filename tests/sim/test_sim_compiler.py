"""torch's compiler on the device: what it writes is queued, captured and replayed as launches."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from reprise import ops


@pytest.fixture
def compiled(platform):
    reason = platform.compiler_missing()
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    return torch.compile(
        lambda rows, ids: (rows[ids] * torch.rsqrt(rows[ids].square().mean(-1, True) + 1e-6)).tanh()
    )


def test_compiled_code_is_queued_and_right(compiled, platform):
    rows, ids = torch.randn(7, 16), torch.tensor([6, 0, 3])
    there = rows.to("sim"), ids.to("sim")
    expected = compiled(*there).cpu()
    torch.testing.assert_close(expected, compiled(rows, ids))
    graph = platform.new_graph()
    result = graph.capture(lambda: compiled(*there))
    there[0].copy_(rows.flip(0))
    graph.replay()
    torch.testing.assert_close(result.cpu(), compiled(rows.flip(0), ids))


@pytest.mark.races
def test_what_compiled_code_writes_is_known_to_the_race_finder(compiled, platform):
    """Two accesses of compiled code in no order are named, like those of any kernel."""
    rows, ids = torch.randn(7, 16, device="sim"), torch.tensor([1, 2], device="sim")
    compiled(rows, ids)
    side = platform.stream()
    platform.synchronize()
    with torch.sim.configured(races=True):
        with platform.use_stream(side):
            result = compiled(rows, ids)
        result.add(1)
        platform.synchronize()
        found = torch.sim.races(clear=True)
    assert any("cpp_" in each and "writes" in each for each in found), found


def test_a_graph_keeps_no_tensor_that_its_function_dropped(platform):
    """Else nothing that a graph computes would lie where something else had lain."""
    weights = torch.ones(16, device="sim")
    rows = torch.randn(4, 16, device="sim")
    dropped = []

    def forward():
        between = ops.rms_norm(rows, weights, 1e-6)
        dropped.append(weakref.ref(between))
        return ops.rms_norm(between, weights, 1e-6)

    graph = platform.new_graph()
    with torch.inference_mode(), ops.OpTable(platform).activate():
        graph.capture(forward)
    gc.collect()
    assert dropped[0]() is None
