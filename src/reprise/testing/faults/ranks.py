"""Faults of one of several ranks, put into its process by name (``parallel.leader.SETUP``,
``replicas.table.SETUP``)."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reprise.distributed import Communicator
from reprise.distributed.ring import Reader
from reprise.graphs import GraphRunner
from reprise.graphs.capture import Capturer
from reprise.graphs.seal import Seal
from reprise.graphs.segments import SegmentedGraph
from reprise.ops.registry import all_ops
from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.parallel import leader, messages
from reprise.platforms.device_graph import launch
from reprise.runner import ModelRunner
from reprise.testing import faults
from reprise.testing.faults.base import BrokenInGraphs

SLOW_SECONDS = 0.1
LATE = 12
"""Calls of what dies or is lost late, before it does."""


def draws_otherwise(rank: int) -> None:
    """What the rank has drawn is not what others have."""
    note = messages.Drawn.note

    def other(self: messages.Drawn, sampled: list[list[int]]) -> None:
        note(self, [[token + 1 for token in each] for each in sampled])

    messages.Drawn.note = other  # type: ignore[assignment,method-assign]


def captures_stale(rank: int) -> None:
    """Its graphs hold a number that is another one in later steps."""
    capture = ModelRunner._capture_graphs

    def wrong(self: ModelRunner) -> None:
        with faults.stale_scalar(self.ops, "paged_attention"):
            capture(self)

    ModelRunner._capture_graphs = wrong  # type: ignore[method-assign]


class _NormOfBefore(BrokenInGraphs):
    name = "norm_of_before"
    summary = "the norm is of what the residual stream held before the sum was added"

    def broken(self, named: dict[str, Any]) -> Any:
        return launch(self._early, **named)

    def _early(self, residual: Tensor, weight: Tensor, eps: float, **others: Any) -> Tensor:
        normed = rms_norm(residual, weight, eps)
        self.original(residual=residual, weight=weight, eps=eps, **others)
        return normed


def norms_too_early(rank: int) -> None:
    """Its graphs normalise what the residual stream held before the sum was added."""
    capture = ModelRunner._capture_graphs

    def wrong(self: ModelRunner) -> None:
        broken = _NormOfBefore(self.ops, all_ops()["all_reduce_add_norm"])
        self.ops.functions["all_reduce_add_norm"] = broken
        capture(self)
        broken.close()

    ModelRunner._capture_graphs = wrong  # type: ignore[method-assign]


def is_slow(rank: int) -> None:
    """It is late at each step."""
    submit = ModelRunner.submit

    def late(self: ModelRunner, *what: Any) -> None:
        time.sleep(SLOW_SECONDS)
        submit(self, *what)

    ModelRunner.submit = late  # type: ignore[assignment,method-assign]


def is_unlike(rank: int) -> None:
    """It has another version of torch."""
    torch.__version__ = "another"  # type: ignore[assignment]


def misses_a_message(rank: int) -> None:
    """One message never reaches it."""
    receive = Reader.receive
    calls = 0

    def lose(self: Reader) -> bytes:
        nonlocal calls
        calls += 1
        if calls == LATE:
            receive(self)
            self._count -= 1
        return receive(self)

    Reader.receive = lose  # type: ignore[method-assign]


def dies_loading(rank: int) -> None:
    _dies_in("__init__", 1)


def dies_capturing(rank: int) -> None:
    _dies_in("_capture_graphs", 1)


def dies_submitting(rank: int) -> None:
    _dies_in("submit", LATE)


def dies_drawing(rank: int) -> None:
    _dies_in("sample", LATE)


def raises_submitting(rank: int) -> None:
    """A step raises on this rank alone."""
    _dies_in("submit", LATE, _raise)


def raises_in_a_pass(rank: int) -> None:
    """It raises where others wait for it in a collective."""
    _dies_in("_run_eagerly", LATE, _raise, GraphRunner)


def raises_capturing(rank: int) -> None:
    """In the midst of the first pass of a graph, where others wait for it in a collective."""
    warm_up, all_reduce = Capturer._warm_up, Communicator.all_reduce
    passing = False

    def watched(self: Capturer, *what: Any) -> None:
        nonlocal passing
        passing = True
        warm_up(self, *what)

    def fail(self: Communicator, *what: Any) -> None:
        if passing:
            _raise()
        all_reduce(self, *what)

    Capturer._warm_up = watched  # type: ignore[assignment,method-assign]
    Communicator.all_reduce = fail  # type: ignore[assignment,method-assign]


def follower_raises(rank: int) -> None:
    """The ranks beside this one: in a pass that other engines go on with."""
    leader.SETUP = (f"{__name__}:{raises_in_a_pass.__name__}",)


def _raise() -> None:
    raise RuntimeError("this rank alone fails")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dies_in(
    method: str, calls: int, die: Callable[[], None] = _kill, owner: Any = ModelRunner
) -> None:
    """The process is killed at its so many-th call of a method of its runner, or raises."""
    inner = getattr(owner, method)

    def call(self: Any, *what: Any, **more: Any) -> Any:
        nonlocal calls
        calls -= 1
        if calls == 0:
            die()
        return inner(self, *what, **more)

    setattr(owner, method, call)


def graphs_go_bad(rank: int) -> None:
    """Each of its graphs' replays on live steps changes memory of another owner, in turn."""
    replay, counts = SegmentedGraph.replay, Counter[str]()
    run = GraphRunner.run
    computing: list[GraphRunner] = []

    def noted(self: GraphRunner, *what: Any) -> Any:
        computing[:] = [self]
        try:
            return run(self, *what)
        finally:
            computing.clear()

    def spoil(self: SegmentedGraph) -> None:
        replay(self)
        if not computing:
            return
        counts["replays"] += 1
        number = counts["replays"]
        if number % 5 == 0:
            owner = ("cache", "beside", "input", "weight")[number // 5 % 4]
            regions = [e for e in computing[0].computation.memory().values() if e.owner == owner]
            region = regions[number % len(regions)]
            for each in region.tensor[:: 1 if region.unit is None else 3]:
                each.add_(1) if each.dtype != torch.bool else each.logical_not_()

    SegmentedGraph.replay = spoil  # type: ignore[method-assign]
    GraphRunner.run = noted  # type: ignore[assignment,method-assign]


def loses_what_canaries_keep(rank: int) -> None:
    """One of its canaries finds that its own copies were changed."""
    broken, calls = Seal.broken, Counter[str]()

    def changed(self: Seal) -> bool:
        calls["all"] += 1
        return calls["all"] == LATE or broken(self)

    Seal.broken = changed  # type: ignore[method-assign]
