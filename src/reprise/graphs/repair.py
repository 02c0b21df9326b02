"""What a graph has spoiled that was found wrong, made good."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from reprise.errors import GraphError
from reprise.graphs.capture import BucketGraph
from reprise.graphs.compare import copies
from reprise.graphs.contract import Computation
from reprise.graphs.guard import Change, Guard, Scope
from reprise.graphs.judge import Judge
from reprise.graphs.mend import mend
from reprise.graphs.seal import Seal
from reprise.graphs.verdict import Verdict
from reprise.shape import StepShape


@dataclass(frozen=True)
class Harm:
    """What is left to do for others."""

    told: str
    """What was wrong, and the op at which it begins if it was found."""
    units: frozenset[tuple[str, int]]
    """Units of the caches, what and which, that the graph changed and must not have."""
    weights: bool
    """It has changed weights; they are right again."""
    earlier: bool
    """Something had changed before the step."""
    changed: frozenset[str]
    """Names of the memory that it changed and must not have."""
    lost: bool = False
    """What could be put back was changed as well: nothing of the step can be used."""


def make_good(
    computation: Computation,
    guard: Guard,
    judge: Judge,
    bucket: BucketGraph,
    shape: StepShape,
    verdict: Verdict,
    agree: Callable[[bool], bool],
) -> Harm:
    """Load weights again that were changed, and find out what was wrong.

    Inputs, state and outputs are those of the eager run already, or as they were before the
    comparison.

    Args:
        computation: Whose graph it is.
        guard: Of its memory.
        judge: Finds the op.
        bucket: The graph's.
        shape: The step in the inputs, without padding.
        verdict: About it.
        agree: Whether all ranks say True.

    Raises:
        WeightsLostError: Weights were changed and cannot be loaded again.
    """
    if not agree(not verdict.lost):
        return _nothing_left(computation, guard, verdict.told)
    changes, where = list(verdict.changes), ""
    _mend(computation, guard, changes)
    # All ranks search or none: they meet in the collectives of what is computed for it.
    if not agree(bool(changes) and not verdict.differences):
        where, more = _where(computation, guard, judge, bucket, shape)
        if not agree(more is not None):
            return _nothing_left(computation, guard, f"{verdict.told}{where}")
        assert more is not None
        _mend(computation, guard, more)
        changes += more
    return Harm(
        f"{verdict.told or 'wrong on another rank'}{where}",
        frozenset(
            (each.unit or "", each.index)
            for each in changes
            if each.owner == "cache" and each.index is not None
        ),
        any(each.owner == "weight" for each in changes),
        any(each.before for each in changes),
        frozenset(each.name for each in changes),
    )


def _nothing_left(computation: Computation, guard: Guard, told: str) -> Harm:
    mend(computation, guard)
    told = told or "what another rank compared it with was changed"
    return Harm(told, frozenset(), False, True, frozenset(), lost=True)


def _mend(computation: Computation, guard: Guard, changes: Iterable[Change]) -> None:
    if any(each.owner == "weight" for each in changes):
        mend(computation, guard)


def _where(
    computation: Computation, guard: Guard, judge: Judge, bucket: BucketGraph, shape: StepShape
) -> tuple[str, list[Change] | None]:
    """The op at which the graph leaves the path of eager execution on the step at hand, and what
    the search has changed, which replays what is wrong: inputs and memory beside are as before.
    None: not even that, since what was kept of them was changed."""
    before = guard.before(Scope())
    inputs = copies(computation.inputs(bucket.shape))
    outputs = copies(computation.outputs(shape))
    state = computation.state(bucket.shape)
    rows = state.read()
    kept = [*inputs.values(), *outputs.values(), *rows.values(), *state.kept(), *before.kept()]
    seal = Seal(kept)

    def refill() -> None:
        if seal.broken():
            raise GraphError("the search changed the step that it is made with")
        for name, tensor in computation.inputs(bucket.shape).items():
            tensor.copy_(inputs[name])

    where = judge.where(bucket, shape, refill)
    if seal.broken():
        return where, None
    refill()
    state.write(rows)
    for name, tensor in computation.outputs(shape).items():
        tensor.copy_(outputs[name])
    guard.flags(before)
    changes = guard.changes(before)
    guard.put_back(before)
    return where, changes
