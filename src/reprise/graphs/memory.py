"""How much device memory the graphs of a plan will take, from two captured buckets a phase."""

from __future__ import annotations

import logging
from collections.abc import Callable

from reprise.errors import describe
from reprise.graphs.capture import BucketGraph
from reprise.graphs.captures import Captures
from reprise.graphs.report import GraphMemory
from reprise.platforms import Platform
from reprise.shape import Phase, StepShape

logger = logging.getLogger(__name__)

MOST = 0.25
"""Of the device's memory; a larger prediction is taken for a driver's lie."""
REPEATS = 3
"""How often the second bucket is captured again: drivers take memory in large pieces. A graph of
more segments than that is many graphs to a driver, and one more capture is enough."""


def predict(
    captures: Captures, free_memory: Callable[[], int] | None = None, *, keep: bool = False
) -> GraphMemory:
    """Capture the two largest buckets of each phase, and throw them away again.

    The allocator knows exactly by how much each capture made the shared pool grow; the second
    bucket stands for the rest. What a driver takes for a graph besides shows in the free memory
    alone: it is the mean over further captures of the second bucket, when all kernels are loaded.
    Where the driver's numbers are of no use (``Platform.graph_memory`` is ``skip``) the
    allocator's count is all there is.
    Never raises: a measurement that fails or lies is logged and left out.

    Args:
        captures: Of a runner, which has none yet; its computation can run (a small cache will do).
        free_memory: Bytes free on the device; the platform's unless given.
        keep: Leave the captured graphs to the caller, which discards them when it has asked all
            runners that share a pool: by how much each makes it grow.

    Returns:
        The prediction, which the runner's report shows from now on.
    """
    memory = captures.memory = GraphMemory()
    platform = captures.platform
    if not captures.plan.captures:
        memory.note = "the plan captures no graphs"
        logger.info("graph memory: none, %s", memory.note)
        return memory
    if platform.graph_memory != "measure":
        memory.note = f"the driver's part is not measured: {platform.graph_memory_reason}"
        if not platform.counts_memory:
            logger.info("graph memory: %s", memory.note)
            return memory
    # Captures in pieces compute, and what computes may spoil.
    captures.learn_weights()
    try:
        total, measured = _measure(captures, free_memory)
    except Exception as error:
        memory.failed = True
        memory.note = f"measurement failed: {describe(error)}"
        logger.warning("graph memory: %s; taken as 0", memory.note)
        return memory
    finally:
        if not keep:
            captures.discard()
    pool = sum(each for each, _ in measured.values())
    driver = sum(each for _, each in measured.values())
    doubt = None
    if any(each < 0 for _, each in measured.values()):
        doubt = "free memory grew during captures"
    elif total is not None and pool + driver > MOST * total:
        doubt = f"{pool + driver} bytes are not credible on a device of {total}"
    if doubt is not None:
        driver = 0
        measured = {shape: (each, 0) for shape, (each, _) in measured.items()}
        memory.note = doubt
        logger.warning("graph memory: %s; only the pool is counted", doubt)
    memory.predicted = pool + driver
    captures.predicted_bytes = {shape: sum(each) for shape, each in measured.items()}
    note = f" ({memory.note})" if doubt is None and memory.note else ""
    logger.info("graph memory: %.1f MiB predicted%s", memory.predicted / 2**20, note)
    return memory


def _measure(
    captures: Captures, free_memory: Callable[[], int] | None
) -> tuple[int | None, dict[StepShape, tuple[int, int]]]:
    """Bytes of the device, None if its driver is not asked; and of every bucket, in the pool and
    in the driver."""
    platform = captures.platform
    asks = platform.graph_memory == "measure"
    total = platform.memory_info().total if asks else None
    free_memory = free_memory or (lambda: platform.memory_info().free)
    pool: dict[Phase, list[int]] = {}
    driver: dict[Phase, int] = {}
    shapes = captures.shapes
    seconds: dict[Phase, BucketGraph] = {}
    with captures.capturer.ready():
        for shape in shapes:
            known = pool.setdefault(shape.phase, [])
            if len(known) < 2:
                seconds[shape.phase] = captures.capture_bucket(shape)
                known.append(seconds[shape.phase].info.bytes)
        for phase, second in seconds.items() if asks else ():
            before = _settled(platform, free_memory)
            repeats = 1 if second.info.segments > REPEATS else REPEATS
            # The runner forgets a bucket that is captured again, but its graph must live on.
            buckets = [captures.capture_bucket(second.shape) for _ in range(repeats)]
            taken = before - _settled(platform, free_memory)
            grown = sum(each.info.bytes for each in buckets)
            driver[phase] = (taken - grown) // repeats
    costs: dict[StepShape, tuple[int, int]] = {}
    for shape in shapes:
        known = pool[shape.phase]
        costs[shape] = (known.pop(0) if len(known) > 1 else known[0], driver.get(shape.phase, 0))
    return total, costs


def _settled(platform: Platform, free_memory: Callable[[], int]) -> int:
    """Free bytes once eager execution's leftovers are returned to the driver."""
    platform.synchronize()
    platform.empty_cache()
    return free_memory()
