# mypy: allow-untyped-defs, no-check-untyped-defs
"""Rows sorted by their expert, on the device: what a product of groups reads its tiles from."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options, next_power_of_2

_MOST_AT_ONCE = 2048
"""Slots that one program sorts without counting them first."""
_BLOCK = 4096
"""Slots that a program looks at in one step where there are more."""


@dataclass(frozen=True)
class Groups:
    """Where the slots of each expert are; a slot is one of a row's K places: ``row * K + k``."""

    slots: Tensor
    """[T * K] int32: the slots in the order of their experts, rows of an expert in theirs. Those of
    no expert are left out: behind the last group it holds anything."""
    tiles: Tensor
    """[3, most tiles] int32: of each tile its expert, its first place in ``slots`` and the place
    behind its group. A tile is up to ``rows`` slots of one expert."""
    count: Tensor
    """[1] int32: how many tiles there are."""
    most: int
    """And how many there may be: launch grids follow from it."""
    rows: int
    """Of a tile."""


def most_tiles(slots: int, experts: int, rows: int) -> int:
    """Tiles of ``rows`` slots that any routing to so many experts needs at most."""
    with_some = min(slots, experts)
    return with_some + (slots - with_some) // rows


def sort_by_expert(ids: Tensor, experts: int, rows: int) -> Groups:
    """Group the slots of ``ids`` into tiles of up to ``rows``.

    Args:
        ids: [T, K] int32; what is no number of an expert goes to none.
        experts: How many there are.
        rows: Of a tile.
    """
    count = ids.numel()
    most = most_tiles(count, experts, rows)
    memory = ids.new_empty(count + 3 * most + 1)
    slots, tiles, number = memory.split([count, 3 * most, 1])
    counts = None
    block = next_power_of_2(count)
    if count > _MOST_AT_ONCE:
        block = _BLOCK
        counts = ids.new_empty(experts)
        launch(count_kernel, (experts,))(
            ids, counts, count, BLOCK=block, num_warps=8, **launch_options()
        )
    launch(sort_kernel, (experts,))(
        ids,
        counts,
        slots,
        tiles,
        number,
        count,
        most,
        EXPERTS=experts,
        ROWS=rows,
        BLOCK=block,
        BLOCK_EXPERTS=next_power_of_2(experts + 1),
        num_warps=max(1, min(8, cdiv(block, 256))),
        **launch_options(),
    )
    return Groups(slots, tiles.view(3, most), number, most, rows)


@triton.jit(do_not_specialize=["count"])
def count_kernel(ids_ptr, counts_ptr, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One program counts the slots of one expert."""
    expert = tl.program_id(0)
    depend(EARLY)
    found = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        found += tl.load(ids_ptr + slot, mask=slot < count, other=-1) == expert
    tl.store(counts_ptr + expert, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["count", "most"])
def sort_kernel(
    ids_ptr,
    counts_ptr,
    slots_ptr,
    tiles_ptr,
    number_ptr,
    count,
    most,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program writes the slots and the tiles of one expert.

    Where no counts are given, BLOCK slots are all, and each program counts them itself.
    """
    expert = tl.program_id(0)
    each = tl.arange(0, BLOCK_EXPERTS)
    slot = tl.arange(0, BLOCK)
    depend(EARLY)

    if counts_ptr is None:
        ids = tl.load(ids_ptr + slot, mask=slot < count, other=-1)
        ids = tl.where((ids >= 0) & (ids < EXPERTS), ids, EXPERTS)
        counts = tl.histogram(ids, BLOCK_EXPERTS)
    else:
        counts = tl.load(counts_ptr + each, mask=each < EXPERTS, other=0)
    counts = tl.where(each < EXPERTS, counts, 0)
    tiles = (counts + (ROWS - 1)) // ROWS
    mine = tl.sum(tl.where(each == expert, counts, 0), axis=0)
    begin = tl.sum(tl.where(each < expert, counts, 0), axis=0)
    first = tl.sum(tl.where(each < expert, tiles, 0), axis=0)
    if expert == 0:
        tl.store(number_ptr, tl.sum(tiles, axis=0))
    for start in range(0, mine, ROWS):
        tile = first + start // ROWS
        tl.store(tiles_ptr + tile, expert)
        tl.store(tiles_ptr + most + tile, begin + start)
        tl.store(tiles_ptr + 2 * most + tile, begin + mine)
    if mine > 0:
        if counts_ptr is None:
            is_mine = (ids == expert).to(tl.int32)
            place = begin + tl.cumsum(is_mine, axis=0) - 1
            tl.store(slots_ptr + place, slot, mask=is_mine != 0)
        else:
            done = begin
            for start in range(0, count, BLOCK):
                is_mine = (
                    tl.load(ids_ptr + start + slot, mask=start + slot < count, other=-1) == expert
                )
                is_mine = is_mine.to(tl.int32)
                place = done + tl.cumsum(is_mine, axis=0) - 1
                tl.store(slots_ptr + place, start + slot, mask=is_mine != 0)
                done += tl.sum(is_mine, axis=0)
