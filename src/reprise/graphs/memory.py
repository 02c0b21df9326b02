"""How much device memory the graphs of a plan will take, from two captured buckets a phase."""

from __future__ import annotations

import logging
from collections.abc import Callable

from reprise.graphs.report import GraphMemory
from reprise.graphs.runner import GraphRunner
from reprise.graphs.shape import Phase, StepShape
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

MOST = 0.25
"""Of the device's memory; a larger prediction is taken for a driver's lie."""


def predict(runner: GraphRunner, free_memory: Callable[[], int] | None = None) -> GraphMemory:
    """Capture the two largest buckets of each phase, and throw them away again.

    The first graph of a phase pays for the pool's memory, which the others share; each further
    one pays for its own nodes, as the second did. Never raises: a measurement that fails or
    lies is logged, and counts as nothing.

    Args:
        runner: Has captured nothing yet; its computation can run (a small cache will do).
        free_memory: Bytes free on the device; the platform's unless given.

    Returns:
        The prediction, which the runner's report shows from now on.
    """
    memory = runner.memory = GraphMemory()
    platform = runner.platform
    if not runner.plan.captures:
        memory.note = "the plan captures no graphs"
        return memory
    if platform.graph_memory != "measure":
        memory.note = f"not measured: {platform.graph_memory_reason}"
        logger.info("graph memory: %s", memory.note)
        return memory
    try:
        total = platform.memory_info().total
        costs = _measure(runner, free_memory or (lambda: platform.memory_info().free))
    except Exception as error:
        memory.note = f"measurement failed: {type(error).__name__}: {error}"
        logger.warning("graph memory: %s; taken as 0", memory.note)
        return memory
    finally:
        runner.discard()
    memory.predicted = sum(costs.values())
    notes = []
    if any(cost < 0 for cost in costs.values()):
        notes.append("free memory grew during a capture")
        memory.predicted = sum(max(0, cost) for cost in costs.values())
    if memory.predicted > MOST * total:
        notes.append(f"{memory.predicted} bytes are not credible on a device of {total}")
        memory.predicted = 0
    if notes:
        memory.note = "; ".join(notes)
        logger.warning("graph memory: %s; taken as %d bytes", memory.note, memory.predicted)
    else:
        logger.info("graph memory: %.1f MiB predicted", memory.predicted / 2**20)
    runner.predicted_bytes = {shape: max(0, cost) for shape, cost in costs.items()}
    return memory


def _measure(runner: GraphRunner, free_memory: Callable[[], int]) -> dict[StepShape, int]:
    """Predicted bytes of every bucket."""
    platform = runner.platform
    costs: dict[StepShape, int] = {}
    measured: dict[Phase, list[int]] = {}
    with runner.capturer.ready():
        for shape in runner.shapes():
            known = measured.setdefault(shape.phase, [])
            if len(known) < 2:
                before = _settled(platform, free_memory)
                runner.capture(shape)
                known.append(before - _settled(platform, free_memory))
            costs[shape] = known[-1]
    return costs


def _settled(platform: Platform, free_memory: Callable[[], int]) -> int:
    """Free bytes once eager execution's leftovers are returned to the driver."""
    platform.synchronize()
    platform.empty_cache()
    return free_memory()
