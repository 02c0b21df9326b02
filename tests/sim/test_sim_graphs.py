"""Graphs of the device: what is refused, and what branches."""

from __future__ import annotations

import time

import pytest
import torch
from reprise_sim import device as sim

from reprise.errors import GraphError


def captured(platform, function):
    with torch.inference_mode():
        with platform.capture_stream():
            function()
        graph = platform.new_graph()
        graph.capture(function)
    return graph


def test_branches_of_a_graph_are_ordered_as_they_were(platform, finder) -> None:
    x, out = torch.zeros(64, device=platform.device), torch.zeros(64, device=platform.device)
    side = platform.stream()

    def step() -> None:
        y = x + 1
        current = platform.current_stream()
        side.wait_stream(current)
        with platform.use_stream(side):
            z = y * 2
        w = y * 3
        current.wait_stream(side)
        out.copy_(z + w)
        z.record_stream(current)  # it goes back to the side stream

    graph = captured(platform, step)
    for value in (1.0, 4.0, 2.0):
        x.fill_(value)
        graph.replay()
        assert out.tolist() == [5 * (value + 1)] * 64
    found = finder()
    assert not found, "\n".join(found)


@pytest.mark.races
@pytest.mark.parametrize("missing", ["fork", "join"])
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_missing_wait_shows_in_some_replay(platform, missing: str, seed: int) -> None:
    """However fast or busy the machine is: what should have been waited for always comes first when
    both branches run freely."""
    x, y, out = (torch.zeros(64, device=platform.device) for _ in range(3))
    side = platform.stream()

    def late() -> None:
        sim.launch("nap", lambda _: time.sleep(2e-3), [x], [])
        out.copy_(y)

    def step() -> None:
        current = platform.current_stream()
        side.wait_stream(current)
        if missing == "fork":
            y.copy_(x)
            with platform.use_stream(side):
                late()
        else:
            with platform.use_stream(side):
                y.copy_(x)
            late()
        current.wait_stream(side)

    with sim.configured(seed=seed):
        graph, right = captured(platform, step), []
        for value in range(1, 9):
            x.fill_(value)
            graph.replay()
            right.append(float(out[0]) == value)
    assert not all(right)


@pytest.mark.races  # outside of a capture nobody refuses it
def test_a_branch_that_nobody_waits_for_is_refused(platform) -> None:
    x = torch.zeros(64, device=platform.device)
    side = platform.stream()

    def step() -> None:
        side.wait_stream(platform.current_stream())
        with platform.use_stream(side):
            x.add_(1)

    with pytest.raises(GraphError, match=r"has work behind aten::add\S* .* does not wait for"):
        captured(platform, step)


def test_an_allocation_outside_of_the_pool_is_refused(platform) -> None:
    side = platform.stream()

    def step() -> None:
        with platform.use_stream(side):
            torch.empty(64, device=platform.device)

    platform.new_graph()
    with platform.capture_stream():
        graph = platform.new_graph()
        with pytest.raises(RuntimeError, match="outside of the graph's pool"):
            graph.capture(step)


def test_a_refusal_that_is_swallowed_makes_the_capture_invalid(platform) -> None:
    x = torch.zeros(64, device=platform.device)

    def step() -> None:
        x.add_(1)
        try:
            x.sum().item()
        except RuntimeError:
            x.add_(2)

    with platform.capture_stream():
        graph = platform.new_graph()
        with pytest.raises(GraphError, match="reading a value on the host"):
            graph.capture(step)


def test_an_event_from_outside_is_refused(platform) -> None:
    x, event = torch.zeros(64, device=platform.device), platform.event()
    event.record(platform.current_stream())

    def step() -> None:
        event.wait(platform.current_stream())
        x.add_(1)

    with platform.capture_stream():
        graph = platform.new_graph()
        with pytest.raises(RuntimeError, match="recorded outside of the capture"):
            graph.capture(step)


def test_memory_that_was_given_back_is_no_longer_replayed(platform) -> None:
    x = [torch.zeros(8 << 20, device=platform.device)]
    graph = captured(platform, lambda: x[0].add_(1))
    x.clear()
    platform.empty_cache()
    with pytest.raises(RuntimeError, match="illegal memory access: aten::add"):
        graph.replay()
    platform.synchronize()


def test_a_capture_that_fails_leaves_its_work_in_order(platform, finder) -> None:
    """What was queued on the capture stream before the error still reads its inputs."""
    x = torch.ones(1 << 16, device=platform.device)
    kept = []

    def fail() -> None:
        kept.append(x * 2)
        raise KeyError("of the model")

    with pytest.raises(KeyError), platform.capture_stream():
        fail()
    x.zero_()
    assert not finder()
    assert kept[0].cpu().min() == 2
