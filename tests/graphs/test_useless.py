"""Graphs that would make no step faster are not captured."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reprise.distributed import ALONE_AGREES
from reprise.graphs import useless
from reprise.graphs.judge import note_times
from reprise.graphs.report import GraphInfo
from reprise.graphs.stopwatch import Times
from reprise.graphs.useless import Useless
from reprise.shape import StepShape

SHAPES = [StepShape.mixed(size, 1) for size in (64, 128, 256, 512, 1024, 2048, 4096)]


class Device:
    """Has a clock of its own; computes in time to the number of tokens, while the host goes on."""

    asynchronous = True
    model = None
    ops = SimpleNamespace(computing=contextlib.nullcontext)

    def __init__(self, host: float, per_token: float) -> None:
        self.now, self.done = 0.0, 0.0
        self.host, self.per_token = host, per_token
        self.first = 0.0
        """What the first pass of each size takes the host besides."""
        self.ran: list[int] = []

    def pad(self, live: StepShape, bucket: StepShape) -> None: ...

    def forward(self, shape: StepShape, model: Any) -> None:
        self.now += self.host + (0 if shape.size in self.ran else self.first)
        self.done = max(self.done, self.now - self.host) + shape.size * self.per_token
        self.ran.append(shape.size)

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)


@pytest.fixture(autouse=True)
def as_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(useless, "BUSY_SECONDS", 0.005)


def foreseen(device: Device, monkeypatch: pytest.MonkeyPatch) -> int | None:
    monkeypatch.setattr(useless, "time", SimpleNamespace(perf_counter=lambda: device.now))
    found = Useless(device, device, ALONE_AGREES)  # type: ignore[arg-type]
    found.foresee(SHAPES)
    return found.foreseen


@pytest.mark.parametrize(
    ("host", "per_token", "expected"),
    [
        (0.010, 20e-6, 1024),  # 512 tokens are computed in 10.2 ms
        (0.010, 1e-6, None),  # the host is what all steps wait for
        (0.001, 1e-3, 64),
        (0.0001, 1e-6, None),  # the host is ahead, of a device that is not busy for long
    ],
)
def test_steps_that_keep_the_device_busy_need_no_graph(
    host, per_token, expected, monkeypatch
) -> None:
    device = Device(host, per_token)
    assert foreseen(device, monkeypatch) == expected
    assert len(device.ran) <= 6, "few passes are worth it"


@pytest.mark.parametrize(
    ("eager", "replay", "submitting", "gains"),
    [
        (0.020, 0.020, 0.008, False),  # the host was ahead: it waited for the device
        (0.020, 0.016, 0.008, True),
        (0.021, 0.021, 0.021, True),  # the host was busy with something else, both times
        (0.004, 0.004, 0.001, True),  # so little that times say nothing
    ],
)
def test_a_graph_gains_nothing_where_the_host_was_ahead(
    eager, replay, submitting, gains, monkeypatch
) -> None:
    assert looked_at(Device(0.001, 20e-6), eager, replay, submitting, monkeypatch) == gains


def test_what_takes_long_beside_the_longest_contexts_alone_has_its_graph(monkeypatch) -> None:
    """Prompts of 512 tokens come without them: there the host is what steps wait for."""
    times = 0.020, 0.020, 0.008
    assert not looked_at(Device(0.008, 20e-6), *times, monkeypatch)
    assert looked_at(Device(0.008, 10e-6), *times, monkeypatch)


def looked_at(
    device: Device, eager: float, replay: float, submitting: float, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether a graph is kept for 512 tokens, which the device computes in time to their number."""
    monkeypatch.setattr(useless, "time", SimpleNamespace(perf_counter=lambda: device.now))
    found = Useless(device, device, ALONE_AGREES)  # type: ignore[arg-type]
    info = GraphInfo("mixed", 512, 0, "full", "full")
    bucket: Any = SimpleNamespace(graph=object(), info=info, shape=StepShape.mixed(512, 1))
    note_times(bucket, Times(eager, replay, submitting))
    found.look_at(bucket)
    return found.found is None


def test_loading_kernels_is_not_what_a_graph_would_save(monkeypatch) -> None:
    device = Device(0.010, 20e-6)
    device.first = 5.0
    assert foreseen(device, monkeypatch) == 1024


def test_ranks_of_different_speed_leave_out_the_same(monkeypatch) -> None:
    """They vote on each size: one that chose by its own times would capture alone."""
    devices = [Device(0.010, 20e-6), Device(0.010, 50e-6), Device(0.060, 40e-6)]
    here, meeting, votes = threading.local(), threading.Barrier(len(devices)), [True] * 3

    def agree(ok: bool) -> bool:
        votes[here.rank] = ok
        meeting.wait(20)
        verdict = all(votes)
        meeting.wait(20)
        return verdict

    def found(rank: int) -> int | None:
        here.rank = rank
        device, agreement = devices[rank], SimpleNamespace(all=agree)
        useless = Useless(device, device, agreement)  # type: ignore[arg-type]
        useless.foresee(SHAPES)
        return useless.foreseen

    clock = SimpleNamespace(perf_counter=lambda: devices[here.rank].now)
    monkeypatch.setattr(useless, "time", clock)
    with ThreadPoolExecutor(len(devices)) as pool:
        assert list(pool.map(found, range(len(devices)))) == [2048] * 3
    assert devices[0].ran == devices[1].ran == devices[2].ran


def test_a_pass_that_fails_leaves_its_graph_to_its_capture(monkeypatch) -> None:
    device = Device(0.010, 20e-6)

    def fails(shape: StepShape, model: Any) -> None:
        raise RuntimeError("no memory")

    device.forward = fails  # type: ignore[method-assign]
    assert foreseen(device, monkeypatch) is None


def test_what_is_foreseen_is_not_captured_and_computed_eagerly(
    toy, make_runner, monkeypatch
) -> None:
    runner = make_runner(toy, "breakable", decode=(8,), mixed=(2, 8))

    def ahead(self: Useless, shape: StepShape) -> bool:
        self.reason = "the device is busy"
        return shape.size == 8

    monkeypatch.setattr(Useless, "_host_is_ahead", ahead)
    with monkeypatch.context() as at_first:
        at_first.setattr(runner.useless, "enabled", True)
        runner.captures.leave_out_useless()
    runner.useless.enabled = False  # times of a busy machine say nothing
    runner.captures.capture_all()
    told = {each.name: (each.executor, each.proof, each.dropped) for each in runner.report().graphs}
    assert told["mixed[8]"] == ("none", "not used", "the device is busy")
    assert told["mixed[2]"][0] == "breakable"
    assert told["decode[8]"][0] == "breakable"
    shape = StepShape.mixed(7, 2)
    toy.fill(shape, 1)
    assert torch.equal(runner.run(shape), toy.eager(shape))
    assert runner.ran.graph is None
