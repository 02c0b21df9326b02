"""A replay, or a capture, that nothing is compared with, and what it must leave alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from reprise.errors import describe
from reprise.graphs.contract import Computation
from reprise.graphs.guard import Guard, Scope
from reprise.graphs.seal import Seal
from reprise.graphs.step_memory import StepMemory
from reprise.graphs.verdict import Verdict
from reprise.shape import StepShape


def run_alone(
    computation: Computation,
    guard: Guard,
    run: Callable[[], object],
    bucket: StepShape,
    scope: Scope | None,
) -> Verdict:
    """Replay or capture the step in the static inputs, for what that leaves in memory that others
    use. What it updates in place is as before afterwards, and so are inputs and memory beside.

    Args:
        computation: Its inputs hold a step, padded to the bucket.
        guard: Of its memory.
        run: Does it.
        bucket: What it is done for.
        scope: The memory that it must leave alone; None: that need not be looked at.

    Returns:
        Whether it did; ``lost`` where that cannot be known.
    """
    step = StepMemory(computation, bucket, bucket)
    before = None if scope is None else guard.before(scope)
    at_first = step.state()
    seal = Seal([*at_first.values(), *step.kept(), *before.kept()]) if before is not None else None
    verdict = Verdict()
    try:
        run()
        if seal is not None and seal.broken():
            return Verdict(lost=True)
        step.put(at_first)
        if before is not None and torch.stack(guard.flags(before)).any():
            verdict.changes += guard.changes(before)
            guard.put_back(before)
    except BaseException as error:
        with contextlib.suppress(Exception):  # for want of memory, as it may be
            step.put(at_first)
            if before is not None:
                guard.put_back(before)  # some of it is written once, at start
        if not isinstance(error, Exception):
            raise
        return Verdict(error=describe(error), ran=before is not None, lost=before is not None)
    return verdict
