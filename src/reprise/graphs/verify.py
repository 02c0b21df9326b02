"""Proof that a graph computes what eager execution computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reprise.errors import ConfigError
from reprise.graphs.compare import (
    Difference,
    copies,
    first_difference,
    poison,
    poison_memory,
)
from reprise.graphs.computation import Computation
from reprise.graphs.segments import SegmentedGraph
from reprise.graphs.shape import StepShape
from reprise.graphs.state import StepState


@dataclass(frozen=True)
class VerifyMode:
    """When graphs are compared with eager execution."""

    startup: bool = True
    canary: int = 0
    """Recompute one in this many replays while serving; 0: none."""

    def __str__(self) -> str:
        if self.canary:
            return f"canary:{self.canary}"
        return "startup" if self.startup else "off"


def parse_verify(text: str) -> VerifyMode:
    """Read ``--graph-verify``: ``off``, ``startup``, or ``canary:N`` (which includes start-up).

    Raises:
        ConfigError: Anything else.
    """
    kind, colon, number = text.strip().lower().partition(":")
    if kind == "canary" and colon and number.isdigit() and int(number) > 0:
        return VerifyMode(startup=True, canary=int(number))
    if kind in ("off", "startup") and not colon:
        return VerifyMode(startup=kind == "startup")
    raise ConfigError(
        f"graph_verify={text!r}: expected off, startup, or canary:N, such as canary:100 "
        "to recompute one step in a hundred"
    )


def check_probe(
    computation: Computation,
    graph: SegmentedGraph,
    bucket: StepShape,
    live: StepShape,
    model: Callable[..., Any],
    memory: list[Tensor],
    *,
    exact: bool,
) -> Difference | None:
    """Compare a replay with eager execution on the static inputs as they are now.

    Unwritten output shows because the two start from different garbage; stale scratch shows
    because the pool is overwritten in between. The state is afterwards what it was before.

    Args:
        computation: Its inputs hold a probe.
        graph: To be judged.
        bucket: What the graph was captured for.
        live: The real rows; only these are compared.
        model: What the graph captured: the computation's model or its compiled form.
        memory: All memory of the graph's pool (may be empty, if unknown).
        exact: Compare bits.
    """
    state = StepState(computation, live)
    before = state.read()
    try:
        for output in computation.outputs(bucket).values():
            output.zero_()
        computation.forward(bucket, model)
        expected = _results(computation, state, live)
        state.write(before)
        poison(computation.outputs(bucket).values())
        poison_memory(memory)
        graph.replay()
        return first_difference(expected, _results(computation, state, live), exact=exact)
    finally:
        state.write(before)


def check_live(
    computation: Computation,
    graph: SegmentedGraph,
    bucket: StepShape,
    live: StepShape,
    model: Callable[..., Any],
    state: StepState,
    before: Mapping[str, Tensor],
    *,
    exact: bool,
) -> Difference | None:
    """Replay a live step, then compute it eagerly from the state ``before``, and compare.

    Afterwards outputs and state are those of the eager run, whatever the verdict.
    """
    poison(computation.outputs(live).values())
    graph.replay()
    got = _results(computation, state, live)
    state.write(before)
    computation.forward(bucket, model)
    return first_difference(_results(computation, state, live), got, exact=exact)


def _results(computation: Computation, state: StepState, live: StepShape) -> dict[str, Tensor]:
    """Copies of all that a step of this shape produced."""
    return {**copies(computation.outputs(live)), **state.read()}
