"""Faults that real engines have had in their graphs, to be put into real ops on purpose.

Each fault is a context manager that wraps the implementation of one op in an op table. Eager
execution stays right; a graph that is captured inside goes wrong. Verification must catch it::

    with faults.stale_scalar(table, "paged_attention"):
        runner.captures.capture_all()
    assert runner.report().quarantined
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from reprise.ops.registry import OpTable, all_ops
from reprise.testing.faults.base import Fault
from reprise.testing.faults.codes import (
    ScaleOfAnotherHead,
    ScaleOfAnotherToken,
    UnscaledRow,
    WrongScale,
)
from reprise.testing.faults.compressed import (
    IndexOfAnother,
    RowNotMade,
    StaleHash,
    StaleRingRow,
    WrongAtOneResidue,
    WrongResidue,
)
from reprise.testing.faults.lifetimes import (
    ChunkReplaysNothing,
    StaleAccepted,
    StateCommittedTwice,
    StateForgotten,
    StateNotZeroed,
    StateOfAnother,
    StateOfRejectedDrafts,
    StateTwice,
    WrongWindow,
)
from reprise.testing.faults.memory import (
    CacheOverrun,
    ChangedBeside,
    ChangedLengths,
    ChangedTables,
    ChangedWeight,
    PaddingWritesLive,
)
from reprise.testing.faults.planted import PlantedFault
from reprise.testing.faults.recorded import (
    DirtyMemory,
    DtypeDrift,
    FreshAllocation,
    HostSync,
    ReturnedOutput,
    SideStreamRace,
    StalePlan,
    StalePointer,
    StaleScalar,
    UnclearedScratch,
    UnwrittenOutput,
    WrongExtent,
)
from reprise.testing.faults.routing import RoutingFault as RoutingFault
from reprise.testing.faults.routing import (
    RowsBeyondTile,
    StaleRouting,
    SwappedRows,
    WrongExpert,
)
from reprise.testing.faults.steps import (
    WrongBesideDecodes,
    WrongDrafts,
    WrongEverySecond,
    WrongFreshPrompt,
    WrongLargeRequest,
    WrongNeighbours,
    WrongPadded,
    WrongPositions,
    WrongPrefixHit,
    WrongThreeOfFour,
    WrongUpperHalf,
    WrongValues,
)

FAULTS: dict[str, type[Fault]] = {
    each.name: each
    for each in (
        StaleScalar, StalePointer, StalePlan, FreshAllocation, UnwrittenOutput, HostSync,
        UnclearedScratch, SideStreamRace, WrongExtent, DtypeDrift, DirtyMemory, ReturnedOutput,
        CacheOverrun, PaddingWritesLive, ChangedTables, ChangedLengths, ChangedWeight,
        ChangedBeside,
        WrongNeighbours, WrongFreshPrompt, WrongLargeRequest, WrongPrefixHit, WrongThreeOfFour,
        WrongUpperHalf, WrongPadded, WrongValues, WrongPositions, WrongBesideDecodes,
        WrongDrafts, WrongEverySecond, WrongWindow, StateNotZeroed, StateForgotten, StateTwice,
        StateOfAnother, StateOfRejectedDrafts, StaleAccepted, StateCommittedTwice,
        ChunkReplaysNothing,
        WrongExpert, StaleRouting, RowsBeyondTile, SwappedRows,
        WrongScale, UnscaledRow, ScaleOfAnotherHead, ScaleOfAnotherToken,
        RowNotMade, StaleRingRow, WrongResidue, WrongAtOneResidue, IndexOfAnother, StaleHash,
    )
}  # fmt: skip
"""Every fault by name."""
RECORDED = [
    name
    for name, each in FAULTS.items()
    if not issubclass(each, PlantedFault) and not each.engine_options
]
"""Those of what a capture keeps: any step of any engine shows them."""


@contextlib.contextmanager
def inject(fault: str, table: OpTable, op: str, computation: Any = None) -> Iterator[Fault]:
    """Break ``op`` in ``table`` within the ``with`` block.

    Args:
        fault: A name in :data:`FAULTS`.
        table: The table that the computation runs with.
        op: Name of the op.
        computation: A :class:`reprise.runner.forward_pass.ForwardPass` that lists what the fault
            spoils of others' memory as lying beside it.
    """
    broken = FAULTS[fault](table, all_ops()[op])
    table.functions[op] = broken
    try:
        with contextlib.nullcontext() if computation is None else _beside(computation, broken):
            yield broken
    finally:
        broken.close()


@contextlib.contextmanager
def _beside(computation: Any, broken: Fault) -> Iterator[None]:
    others = computation.beside
    computation.beside = lambda: {**others(), **broken.beside}
    try:
        yield
    finally:
        computation.beside = others


def _named(fault: str) -> Callable[[OpTable, str], contextlib.AbstractContextManager[Fault]]:
    def broken(table: OpTable, op: str) -> contextlib.AbstractContextManager[Fault]:
        return inject(fault, table, op)

    broken.__name__ = fault
    broken.__doc__ = f"Break ``op`` in ``table``: {FAULTS[fault].summary}."
    return broken


stale_scalar = _named("stale_scalar")
stale_pointer = _named("stale_pointer")
stale_plan = _named("stale_plan")
uncleared_scratch = _named("uncleared_scratch")
fresh_allocation = _named("fresh_allocation")
unwritten_output = _named("unwritten_output")
host_sync = _named("host_sync")
side_stream_race = _named("side_stream_race")
wrong_extent = _named("wrong_extent")
dtype_drift = _named("dtype_drift")
dirty_memory = _named("dirty_memory")
returned_output = _named("returned_output")
cache_overrun = _named("cache_overrun")
padding_writes_live = _named("padding_writes_live")
changed_tables = _named("changed_tables")
changed_lengths = _named("changed_lengths")
changed_weight = _named("changed_weight")
changed_beside = _named("changed_beside")
wrong_neighbours = _named("wrong_neighbours")
wrong_fresh_prompt = _named("wrong_fresh_prompt")
wrong_large_request = _named("wrong_large_request")
wrong_prefix_hit = _named("wrong_prefix_hit")
wrong_three_of_four = _named("wrong_three_of_four")
wrong_upper_half = _named("wrong_upper_half")
wrong_padded = _named("wrong_padded")
wrong_values = _named("wrong_values")
wrong_positions = _named("wrong_positions")
wrong_beside_decodes = _named("wrong_beside_decodes")
wrong_drafts = _named("wrong_drafts")
wrong_every_second = _named("wrong_every_second")
wrong_window = _named("wrong_window")
state_not_zeroed = _named("state_not_zeroed")
state_forgotten = _named("state_forgotten")
state_twice = _named("state_twice")
state_of_another = _named("state_of_another")
state_of_rejected_drafts = _named("state_of_rejected_drafts")
chunk_replays_nothing = _named("chunk_replays_nothing")
stale_accepted = _named("stale_accepted")
state_committed_twice = _named("state_committed_twice")
wrong_expert = _named("wrong_expert")
stale_routing = _named("stale_routing")
rows_beyond_tile = _named("rows_beyond_tile")
swapped_rows = _named("swapped_rows")
wrong_scale = _named("wrong_scale")
unscaled_row = _named("unscaled_row")
scale_of_another_head = _named("scale_of_another_head")
scale_of_another_token = _named("scale_of_another_token")
row_not_made = _named("row_not_made")
stale_ring_row = _named("stale_ring_row")
wrong_residue = _named("wrong_residue")
wrong_at_one_residue = _named("wrong_at_one_residue")
index_of_another = _named("index_of_another")
stale_hash = _named("stale_hash")
