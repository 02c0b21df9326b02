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
REPEATS = 3
"""How often the second bucket is captured again: drivers take memory in large pieces."""


def predict(runner: GraphRunner, free_memory: Callable[[], int] | None = None) -> GraphMemory:
    """Capture the two largest buckets of each phase, and throw them away again.

    The allocator knows exactly by how much each capture made the shared pool grow; the second
    bucket stands for the rest. What a driver takes for a graph besides shows in the free memory
    alone: it is the mean over further captures of the second bucket, when all kernels are loaded.
    Never raises: a measurement that fails or lies is logged and left out.

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
        measured = _measure(runner, free_memory or (lambda: platform.memory_info().free))
    except Exception as error:
        memory.note = f"measurement failed: {type(error).__name__}: {error}"
        logger.warning("graph memory: %s; taken as 0", memory.note)
        return memory
    finally:
        runner.discard()
    pool = sum(each for each, _ in measured.values())
    driver = sum(each for _, each in measured.values())
    if any(each < 0 for _, each in measured.values()):
        memory.note = "free memory grew during captures"
    elif pool + driver > MOST * total:
        memory.note = f"{pool + driver} bytes are not credible on a device of {total}"
    if memory.note:
        driver = 0
        measured = {shape: (each, 0) for shape, (each, _) in measured.items()}
        logger.warning("graph memory: %s; only the pool is counted", memory.note)
    memory.predicted = pool + driver
    runner.predicted_bytes = {shape: sum(each) for shape, each in measured.items()}
    logger.info("graph memory: %.1f MiB predicted", memory.predicted / 2**20)
    return memory


def _measure(
    runner: GraphRunner, free_memory: Callable[[], int]
) -> dict[StepShape, tuple[int, int]]:
    """Bytes in the pool and in the driver, of every bucket."""
    pool: dict[Phase, list[int]] = {}
    driver: dict[Phase, int] = {}
    shapes = runner.shapes()
    seconds: dict[Phase, StepShape] = {}
    with runner.capturer.ready():
        for shape in shapes:
            known = pool.setdefault(shape.phase, [])
            if len(known) < 2:
                known.append(runner.capture(shape).info.bytes)
                seconds[shape.phase] = shape
        for phase, shape in seconds.items():
            before = _settled(runner.platform, free_memory)
            # The runner forgets a cell that is captured again, but its graph must live on.
            cells = [runner.capture(shape) for _ in range(REPEATS)]
            taken = before - _settled(runner.platform, free_memory)
            grown = sum(each.info.bytes for each in cells)
            driver[phase] = (taken - grown) // REPEATS
    costs: dict[StepShape, tuple[int, int]] = {}
    for shape in shapes:
        known = pool[shape.phase]
        costs[shape] = (known.pop(0) if len(known) > 1 else known[0], driver[shape.phase])
    return costs


def _settled(platform: Platform, free_memory: Callable[[], int]) -> int:
    """Free bytes once eager execution's leftovers are returned to the driver."""
    platform.synchronize()
    platform.empty_cache()
    return free_memory()
