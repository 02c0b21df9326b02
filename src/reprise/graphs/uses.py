"""Which ops a computation calls, and the executors that they allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from reprise.graphs.contract import Computation
from reprise.graphs.padding import compute_padding
from reprise.graphs.plan import (
    Executor,
    GraphPlan,
    Wanted,
    outside_of_graphs,
    resolve,
    support_of,
)
from reprise.ops.implementation import Implementation
from reprise.ops.registry import Op, OpTable, intercept
from reprise.ops.rehearsal import rehearsal
from reprise.platforms import Platform
from reprise.shape import PHASES, Phase, StepShape

Uses = Sequence[tuple[Op, Implementation]]
"""Ops that are called, each with what computes it; one that several compute is there for each."""


def uses_of(table: OpTable, forward: Callable[[], Any]) -> Uses:
    """What ``forward`` calls, found by calling it. Nothing is computed: ops return memory of any
    content."""
    found: dict[tuple[str, str], tuple[Op, Implementation]] = {}

    def note(op: Op, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        implementation = table.implementation_of(op, args, kwargs)
        found[op.name, implementation.name] = op, implementation
        return op.fake(*args, **kwargs)

    with table.computing(), intercept(note):
        forward()
    return list(found.values())


def may_capture(requested: GraphPlan[Wanted], platform: Platform) -> bool:
    """Whether any phase may get graphs, whatever it calls."""
    idle = ("none",) if platform.graphs_by_default else ("none", "auto")
    return any(requested.of(phase) not in idle for phase in PHASES)


def uses_of_phase(computation: Computation, phase: Phase, query_lens: Sequence[int]) -> Uses:
    """What one small step of each kind calls."""
    shapes = [StepShape.mixed(1, 1)]
    if phase == "decode":
        shapes = [StepShape.decode(1, each) for each in query_lens]

    def forward() -> None:
        with rehearsal():
            for shape in shapes:
                compute_padding(computation, shape)

    return uses_of(computation.ops, forward)


def largest_error(used: Iterable[Implementation]) -> float | None:
    """The largest declared error of the implementations that are not exact; None: all are. One
    that varies makes all that follows it vary."""
    return max((each.error for each in used if each.error is not None), default=None)


def plan_for(
    used: Mapping[Phase, Uses],
    platform: Platform,
    requested: GraphPlan[Wanted],
    query_lens: Sequence[int],
) -> GraphPlan[Executor]:
    """The executors that run a computation which calls ``used``."""
    return resolve(
        requested,
        platform,
        {phase: support_of(uses, platform) for phase, uses in used.items()},
        refused={phase: outside_of_graphs(uses, platform) for phase, uses in used.items()},
        query_len=max(query_lens),
        compiler_reason=platform.compiler_missing(),
    )
