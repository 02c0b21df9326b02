"""The race finder: two accesses that no event orders, whatever ran first."""

from __future__ import annotations

import threading

import pytest
import torch
from reprise_sim import device as sim

SIZE = 1 << 12


@pytest.fixture
def make(platform):
    def tensor(value: float = 0.0) -> torch.Tensor:
        return torch.full((SIZE,), value, device=platform.device)

    return tensor


def between(races: list[str], first: str, second: str) -> None:
    """One of them is between the two, and says where each was submitted."""
    assert len(races) == 1, races
    for each in (first, second):
        assert each in races[0], races[0]
    assert races[0].count("test_sim_races.py:") >= 2, races[0]


def test_ordered_work_is_no_race(platform, make, finder) -> None:
    x, side = make(1), platform.stream()
    for _ in range(3):
        side.wait_stream(platform.current_stream())
        with platform.use_stream(side):
            x.add_(1)
        platform.current_stream().wait_stream(side)
        x.mul_(2)
    event = platform.event()
    side.wait_stream(platform.current_stream())
    with platform.use_stream(side):
        y = x + 1
        event.record(side)
    event.synchronize()  # through the host, too
    y.add_(x)
    host = torch.zeros(SIZE, pin_memory=True)
    host.copy_(y, non_blocking=True)
    platform.synchronize()
    host.fill_(0)
    found = finder()
    assert not found, "\n".join(found)


def test_a_missing_wait_on_a_side_stream(platform, make, finder) -> None:
    x, side = make(), platform.stream()
    side.wait_stream(platform.current_stream())
    x.fill_(1)
    with platform.use_stream(side):
        x.sum()
    between(finder(), "aten::fill_.Scalar writes on sim:0 stream 0", "aten::sum")


def test_an_event_that_is_recorded_too_early(platform, make, finder) -> None:
    x, side, event = make(), platform.stream(), platform.event()
    event.record(platform.current_stream())
    x.fill_(1)
    side.wait_event(event)
    with platform.use_stream(side):
        x.sum()
    between(finder(), "aten::fill_.Scalar writes on sim:0 stream 0", "aten::sum")


def test_writing_what_another_stream_still_reads(platform, make, finder) -> None:
    x, side = make(), platform.stream()
    side.wait_stream(platform.current_stream())
    with platform.use_stream(side):
        x.sum()
    x.fill_(1)
    between(finder(), "reads on sim:0 stream", "aten::fill_.Scalar writes on sim:0 stream 0")


def test_a_host_buffer_that_is_reused_before_its_copy_has_run(platform, make, finder) -> None:
    x, buffer, go_on = make(), torch.ones(SIZE, pin_memory=True), threading.Event()
    sim.launch("held", lambda _: go_on.wait(100), [x], [0])
    x.copy_(buffer, non_blocking=True)
    buffer.fill_(2)
    go_on.set()
    platform.synchronize()
    (race,) = finder()
    assert race.startswith("host: memory")
    assert "test_sim_races.py:" in race


NOBODY_S = 0x7FFF
"""In each two bytes of what nobody has written."""


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int16]
)
def test_reading_what_has_not_arrived(platform, finder, dtype: torch.dtype) -> None:
    """The host's reads cannot be seen: what is there until the copy has run is no number, and no
    integer that could be a token, an index or a -1."""
    x = torch.full((SIZE,), 3, dtype=dtype, device=platform.device)
    buffer, go_on = torch.zeros(SIZE, dtype=dtype, pin_memory=True), threading.Event()
    sim.launch("held", lambda _: go_on.wait(100), [x], [0])
    buffer.copy_(x, non_blocking=True)
    if dtype.is_floating_point:
        assert bool(buffer.isnan().all())
    assert bool((buffer.view(torch.int16) == NOBODY_S).all())
    go_on.set()
    platform.synchronize()
    assert bool(buffer.eq(3).all())
    found = finder()
    assert not found, "\n".join(found)


def test_what_nobody_has_written_is_no_number(platform) -> None:
    """New memory, on the device and pinned: also in pieces that begin and end at odd bytes."""
    for count in (SIZE, SIZE + 1):
        there = torch.empty(count, dtype=torch.int16, device=platform.device)
        here = torch.empty(count, dtype=torch.int16, pin_memory=True)
        assert bool((there == NOBODY_S).all())
        assert bool((here == NOBODY_S).all())
    target = torch.zeros(SIZE, dtype=torch.uint8, pin_memory=True)
    source, go_on = torch.ones(SIZE, dtype=torch.uint8, device=platform.device), threading.Event()
    with sim.configured(races=True):
        sim.launch("held", lambda _: go_on.wait(100), [source], [0])
        target[3:10].copy_(source[3:10], non_blocking=True)
        seen = target[:12].tolist()
        go_on.set()
        platform.synchronize()
    assert seen == [0] * 3 + [127, 255, 127, 255, 127, 255, 127] + [0] * 2
    assert target[:12].tolist() == [0] * 3 + [1] * 7 + [0] * 2


def test_a_graph_that_is_replayed_while_its_inputs_are_written(platform, make, finder) -> None:
    x, out, side = make(1), make(), platform.stream()
    with torch.inference_mode():
        graph = platform.new_graph()
        graph.capture(lambda: out.copy_(x * 2))
    side.wait_stream(platform.current_stream())
    finder()
    with platform.use_stream(side):
        x.fill_(2)
    graph.replay()
    platform.synchronize()
    between(finder(), "aten::fill_.Scalar writes", "aten::mul.out reads on sim:0 stream 0")


def test_memory_that_is_freed_while_another_stream_reads_it(platform, make, finder) -> None:
    x, side = make(1), platform.stream()
    side.wait_stream(platform.current_stream())
    with platform.use_stream(side):
        x.sum()
    del x
    between(finder(), "the release of memory writes on sim:0 stream 0", "aten::sum")


def test_a_capture_with_a_missing_wait(platform, make, finder) -> None:
    """A branch that does not wait for what it reads shows in replays."""
    x, out, side = make(1), make(), platform.stream()

    def step() -> None:
        current = platform.current_stream()
        side.wait_stream(current)
        y = x + 1
        with platform.use_stream(side):
            z = y * 2
        current.wait_stream(side)
        out.copy_(z)

    with torch.inference_mode():
        graph = platform.new_graph()
        graph.capture(step)
    finder()
    graph.replay()
    platform.synchronize()
    races = finder()
    assert any("aten::add.out writes" in each and "aten::mul.out reads" in each for each in races)
