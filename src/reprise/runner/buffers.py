"""Tensors that keep their addresses: a step is written into them, a graph reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprise.cache import NULL_BLOCK, Batch, Table
from reprise.graphs.kinds import Kind
from reprise.platforms import Platform
from reprise.request import Request
from reprise.runner.kinds import RowLayouts, kind_of_step
from reprise.shape import StepShape
from reprise.step import ScheduledRequest, ScheduledStep

Ints = np.ndarray[Any, Any]

ALIGNMENT = 256
"""Bytes; each array begins at a multiple, as if it had been allocated on its own."""
GAP = 1 << 16
"""Bytes between two parts of a step's inputs up to which one copy takes both: at the speed of a
bus that is a microsecond or two, and a second copy costs the device as much and the host more."""
EDITS = 1024
"""Entries of block tables that travel with a step's other inputs; more take a copy of their own."""


def to_device(array: Ints, platform: Platform) -> Tensor:
    """The array on the device, without waiting for the work that the device has to do before."""
    host = torch.from_numpy(array)
    if platform.pins_memory:
        host = host.pin_memory()
    return host.to(platform.device, non_blocking=True)


class Arena:
    """Arrays in one piece of device memory, filled from one piece of host memory.

    Where the device reads host memory as it is, both are one. Elsewhere the host side is a pair
    of page-locked buffers in turn, since a copy may still be under way when the next step is
    filled; at most one step may be outstanding.

    Args:
        arrays: Length and dtype of each, in the order in which they lie in memory.
        platform: Where the device side lives.
        shared: Whether the device reads host memory; None: as the platform's does.
    """

    def __init__(
        self,
        arrays: Sequence[tuple[int, torch.dtype]],
        platform: Platform,
        shared: bool | None = None,
    ) -> None:
        begins, end = [], 0
        for length, dtype in arrays:
            begins.append(end)
            end += -(-length * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.shared = platform.device.type == "cpu" if shared is None else shared
        self._device = torch.zeros(end, dtype=torch.uint8, device=platform.device)
        if self.shared:
            self._staging = [self._device]
        else:
            pin = platform.pins_memory
            self._staging = [torch.zeros(end, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self._turn = 0
        self.arrays = [
            StagedArray(self, begin, length, dtype)
            for begin, (length, dtype) in zip(begins, arrays, strict=True)
        ]

    def flip(self) -> None:
        """Switch to the other staging buffer; its old content is stale."""
        self._turn = (self._turn + 1) % len(self._staging)

    def upload(self, spans: Sequence[tuple[int, int]]) -> None:
        """Make parts of the host side visible on the device.

        Args:
            spans: (begin, end) of each in bytes, ascending. What lies in a small gap between two
                may be sent along, stale as it may be.
        """
        if self.shared:
            return
        begin, end = spans[0]
        for next_begin, next_end in spans[1:]:
            if next_begin - end > GAP:
                self._copy(begin, end)
                begin = next_begin
            end = next_end
        self._copy(begin, end)

    def _copy(self, begin: int, end: int) -> None:
        if end > begin:
            source = self._staging[self._turn][begin:end]
            self._device[begin:end].copy_(source, non_blocking=True)


class StagedArray:
    """One array of an arena: [length] on the device, and the host side to fill it from."""

    def __init__(self, arena: Arena, begin: int, length: int, dtype: torch.dtype) -> None:
        self._arena = arena
        self._begin = begin
        self._itemsize = dtype.itemsize
        end = begin + length * dtype.itemsize
        self.device = arena._device[begin:end].view(dtype)
        self._hosts: list[Ints] = [each[begin:end].view(dtype).numpy() for each in arena._staging]

    @property
    def host(self) -> Ints:
        """Write here, then upload."""
        return self._hosts[self._arena._turn]

    @property
    def last(self) -> Ints:
        """What :attr:`host` was before the last flip: the same array where memory is shared."""
        return self._hosts[self._arena._turn - 1]

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Where elements ``begin`` to ``end`` lie in the arena, in bytes."""
        return self._begin + begin * self._itemsize, self._begin + end * self._itemsize


@dataclass(frozen=True)
class Sampled:
    """What a step sampled, while it may be on the device only."""

    requests: list[Request]
    tokens: Tensor
    """[S] int64, one for each of the requests."""


class StepBuffers:
    """The inputs of one step, for at most ``max_tokens`` tokens of ``max_requests`` requests.

    All but the block tables lie side by side in an arena, so that a step takes one copy to the
    device. Block tables are large and change little: only their new entries are sent.

    Args:
        max_tokens: Most new tokens in a step.
        max_requests: Most requests in a step.
        max_blocks: Most cache blocks of one request.
        block_size: Tokens in a block.
        platform: Where the device side lives.
        shared: Whether the device reads host memory; None: as the platform's does.
    """

    def __init__(
        self,
        max_tokens: int,
        max_requests: int,
        max_blocks: int,
        block_size: int,
        platform: Platform,
        shared: bool | None = None,
    ) -> None:
        self.block_size = block_size
        self.max_tokens, self.max_requests = max_tokens, max_requests
        per_request, per_token = (max_requests, torch.int32), (max_tokens, torch.int64)
        row_numbers = (max_requests, torch.int64)
        self._arena = Arena(
            [
                (max_requests + 1, torch.int32),
                row_numbers,
                row_numbers,
                row_numbers,
                # A step that continues the last one sends nothing before this line.
                per_request,
                (EDITS, torch.int64),
                (EDITS, torch.int32),
                per_token,
                per_token,
                # Nor behind this one.
                per_token,
            ],
            platform,
            shared,
        )
        (
            self.query_start_loc,
            self._sampling_rows,
            self._pending_targets,
            self._pending_sources,
            self.seq_lens,
            self._edit_places,
            self._edit_values,
            self.positions,
            self.slot_mapping,
            self.input_ids,
        ) = self._arena.arrays
        self._per_token = (self.positions, self.slot_mapping, self.input_ids)
        self.platform = platform
        shape = (max_requests, max_blocks)
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=platform.device)
        self._flat_tables = self.block_tables.view(-1)
        self._tables: Ints = (
            self.block_tables.numpy() if self._arena.shared else np.zeros(shape, dtype=np.int32)
        )
        """What the block tables hold, on the host."""
        self._owners: list[list[int] | None] = [None] * max_requests
        self._filled = [0] * max_requests
        self.layouts = RowLayouts(max_requests)
        self._counts: Ints = np.ones(max_requests, dtype=np.int64)
        self._step: tuple[Ints, Ints] = (self._counts[:0], self._counts[:0])
        """Of the step that was filled last, new tokens and lengths of its requests."""
        self._last_rows: tuple[int, int] | None = None
        """Of the last step, if the next one can continue it: requests, and rows with padding."""
        self._padded: tuple[int, int, int, int] | None = None
        """The arguments of :meth:`fill_padding` that :meth:`fill` has done the work for."""

    def fill(
        self, step: ScheduledStep, last: Sampled | None = None, num_rows: int | None = None
    ) -> None:
        """Write a step's requests in their order.

        Args:
            step: What to compute.
            last: What the step before sampled; pending tokens are taken from it on the device.
            num_rows: Of a decode step: rows up to this one are padded (:meth:`fill_padding`).
        """
        self._arena.flip()
        rows = (len(step.requests), num_rows or len(step.requests))
        decode = step.shape.phase == "decode"
        if step.continues and self._last_rows == rows:
            assert last is not None, "the step before has sampled"
            self._fill_next(step.requests, rows[1])
            self.input_ids.device[: rows[0]].copy_(last.tokens)
        else:
            self._fill_anew(step, last, rows[1] if decode else 0)
            self._last_rows = rows if decode else None
        self._padded = (rows[0], rows[0], rows[1], rows[1]) if decode else None

    def _fill_next(self, scheduled: Sequence[ScheduledRequest], num_rows: int) -> None:
        """Write the same rows as in the last step, each with its next token. What it cost to loop
        over requests here would be paid in every step of a decode."""
        requests, size = len(scheduled), self.block_size
        positions = self.positions.host[:num_rows]
        slots = self.slot_mapping.host[:num_rows]
        lengths = self.seq_lens.host[:num_rows]
        np.add(self.positions.last[:num_rows], 1, out=positions)
        np.add(self.slot_mapping.last[:num_rows], 1, out=slots)
        np.add(self.seq_lens.last[:num_rows], 1, out=lengths)
        if num_rows > requests:
            positions[requests:] = slots[requests:] = lengths[requests:] = 0
        # Only those whose token begins a block have a new entry in their block table.
        begun = (positions[:requests] % size == 0).nonzero()[0]
        places = values = begun
        if len(begun):
            columns = positions[begun] // size
            blocks: list[int] = []
            for row, column in zip(begun.tolist(), columns.tolist(), strict=True):
                owned = scheduled[row].block_ids
                blocks.append(owned[column])
                self.layouts.append(row, owned[column], owned[column - 1] if column else None)
                self._filled[row] = column + 1
            values = np.array(blocks, dtype=np.int32)
            places = begun * self._tables.shape[1] + columns
            self._tables.reshape(-1)[places] = values
            slots[begun] = values.astype(np.int64) * size
        self._step = (self._counts[:requests], lengths[:requests])
        self._upload(
            [self.seq_lens.span(0, num_rows)],
            (places, values),
            [self.positions.span(0, num_rows), self.slot_mapping.span(0, num_rows)],
        )

    def _fill_anew(self, step: ScheduledStep, last: Sampled | None, num_rows: int) -> None:
        """Write any step. Rows that hold the request of the step before keep their tables."""
        scheduled = step.requests
        edits = self._edit_tables(scheduled)
        tokens, requests = step.num_tokens, len(scheduled)
        counts = np.array([each.num_tokens for each in scheduled], dtype=np.int64)
        starts = np.array([each.start for each in scheduled], dtype=np.int64)
        self._write_rows(counts, starts + counts)
        self._step = (counts, starts + counts)
        samples = np.array([each.samples for each in scheduled])
        sampling = int(samples.sum())
        self._sampling_rows.host[:sampling] = (np.cumsum(counts) - 1)[samples]

        ids: list[int] = []
        pending: list[Request] = []
        targets: list[int] = []
        for each in scheduled:
            if each.pending:
                pending.append(each.request)
                targets.append(len(ids))
                ids.append(0)
            else:
                ids += each.request.token_ids[each.start : each.start + each.num_tokens]
        self.input_ids.host[:tokens] = ids
        count = len(pending)
        if count:
            assert last is not None, "a pending token was sampled by the step before"
            row_of = {request: row for row, request in enumerate(last.requests)}
            self._pending_targets.host[:count] = targets
            self._pending_sources.host[:count] = [row_of[request] for request in pending]

        to_tokens, to_requests = max(tokens, num_rows), max(requests, num_rows)
        self._write_padding(tokens, requests, to_tokens, to_requests)
        self._upload(
            [
                self.query_start_loc.span(0, to_requests + 1),
                self._sampling_rows.span(0, sampling),
                self._pending_targets.span(0, count),
                self._pending_sources.span(0, count),
                self.seq_lens.span(0, to_requests),
            ],
            edits,
            [each.span(0, to_tokens) for each in self._per_token],
        )
        if count and last is not None:
            taken = last.tokens[self._pending_sources.device[:count]]
            self.input_ids.device.index_copy_(0, self._pending_targets.device[:count], taken)

    def sampling_rows(self, count: int) -> Tensor:
        """[S] int64: the index of the last token of every request that samples, of which there
        are ``count`` in the step that was filled last. Not written for a step that continues one,
        where all rows are sampled."""
        return self._sampling_rows.device[:count]

    def fill_rows(self, counts: Ints, lengths: Ints, tables: Ints, token_ids: Ints) -> None:
        """Write a made-up step.

        Args:
            counts: [R], new tokens of each request.
            lengths: [R], tokens of each request, the new ones included.
            tables: [R, M] int32, blocks of each request.
            token_ids: [T], the new tokens.
        """
        self._arena.flip()
        self.forget_tables()
        requests, width = tables.shape
        self._tables[:requests, :width] = tables
        self.block_tables[:requests].copy_(to_device(self._tables[:requests], self.platform))
        self.input_ids.host[: len(token_ids)] = token_ids
        self._write_rows(counts, lengths)
        self._arena.upload(
            [
                self.query_start_loc.span(0, requests + 1),
                self.seq_lens.span(0, requests),
                *(each.span(0, len(token_ids)) for each in self._per_token),
            ]
        )

    def fill_padding(self, tokens: int, requests: int, to_tokens: int, to_requests: int) -> None:
        """Make the rows from a step's end to a bucket's end harmless: null block, length 0."""
        if self._padded == (tokens, requests, to_tokens, to_requests):
            return
        # Rows are overwritten that the next step might have continued.
        self._last_rows = self._padded = None
        self._write_padding(tokens, requests, to_tokens, to_requests)
        for span in (
            self.query_start_loc.span(requests + 1, to_requests + 1),
            self.seq_lens.span(requests, to_requests),
            *(each.span(tokens, to_tokens) for each in self._per_token),
        ):
            # Each alone: between them lie tokens that only the device knows.
            self._arena.upload([span])

    def kind(self, bucket: StepShape) -> Kind:
        """The kind of the step that was filled last, padded to ``bucket``."""
        counts, lengths = self._step
        layouts = self.layouts.codes(len(counts))
        return kind_of_step(counts, lengths, layouts, bucket, self.block_size)

    def blocks_near(self, bucket: StepShape, num_blocks: int, *, reads: bool) -> Ints:
        """Blocks that the step in the buffers writes, those next to them, the first of each row,
        and the null block: [K] int64, ascending.

        Args:
            bucket: What the step is padded to.
            num_blocks: Of the cache.
            reads: Those that the step reads, too.
        """
        near = np.zeros(num_blocks + 1, dtype=bool)
        near[NULL_BLOCK] = True
        near[self._tables[: bucket.num_requests, 0]] = True
        if reads:
            lengths = self.seq_lens.host[: bucket.num_requests]
            for row, length in enumerate(lengths.tolist()):
                near[self._tables[row, : -(-length // self.block_size)]] = True
        written = self.slot_mapping.host[: bucket.num_tokens] // self.block_size
        for each in (written - 1, written, written + 1):
            near[each] = True  # -1 is the last one, which does not exist
        return near[:num_blocks].nonzero()[0]

    def arrays(self) -> dict[str, Tensor]:
        """All device memory of this, by name."""
        names = (
            "query_start_loc", "sampling_rows", "pending_targets", "pending_sources", "seq_lens",
            "edit_places", "edit_values", "positions", "slot_mapping", "input_ids",
        )  # fmt: skip
        arrays = dict(zip(names, (each.device for each in self._arena.arrays), strict=True))
        return {**arrays, "block_tables": self.block_tables}

    def batch(self, tokens: int, requests: int, query_len: int) -> Batch:
        """Views of the device side for a step of this size."""
        table = Table(self.block_tables[:requests], self.slot_mapping.device[:tokens])
        return Batch(
            token_ids=self.input_ids.device[:tokens],
            positions=self.positions.device[:tokens],
            query_start_loc=self.query_start_loc.device[: requests + 1],
            seq_lens=self.seq_lens.device[:requests],
            tables=(table,),
            query_len=query_len,
        )

    def views(self, tokens: int, requests: int) -> dict[str, Tensor]:
        """The device side of every input, cut to a step of this size."""
        return {
            "input_ids": self.input_ids.device[:tokens],
            "positions": self.positions.device[:tokens],
            "slot_mapping": self.slot_mapping.device[:tokens],
            "query_start_loc": self.query_start_loc.device[: requests + 1],
            "seq_lens": self.seq_lens.device[:requests],
            "block_tables": self.block_tables[:requests],
        }

    def forget_tables(self) -> None:
        """The device's inputs were overwritten; send all that a step needs again."""
        self._owners = [None] * len(self._owners)
        self._last_rows = self._padded = None

    def _edit_tables(self, scheduled: Sequence[ScheduledRequest]) -> tuple[Ints, Ints]:
        """Find the entries of block tables that the device lacks: flat indices and values."""
        width = self._tables.shape[1]
        places: list[int] = []
        values: list[int] = []
        for row, each in enumerate(scheduled):
            blocks = each.block_ids
            # The list is the request's as long as it runs; it grows, but never changes.
            filled = self._filled[row] if self._owners[row] is blocks else 0
            if filled == len(blocks):
                continue
            places += range(row * width + filled, row * width + len(blocks))
            values += blocks[filled:]
            self.layouts.extend(row, blocks[filled:], blocks[filled - 1] if filled else None)
            self._owners[row], self._filled[row] = blocks, len(blocks)
        edits = np.array(places, dtype=np.int64), np.array(values, dtype=np.int32)
        self._tables.reshape(-1)[edits[0]] = edits[1]
        return edits

    def _write_rows(self, counts: Ints, lengths: Ints) -> None:
        """All that follows from the tables and from how many tokens each request has."""
        requests, size = len(counts), self.block_size
        ends = np.cumsum(counts)
        tokens = int(ends[-1])
        rows = np.repeat(np.arange(requests), counts)
        positions = np.arange(tokens) + (lengths - ends)[rows]
        blocks = self._tables[rows, positions // size].astype(np.int64)
        self.positions.host[:tokens] = positions
        self.slot_mapping.host[:tokens] = blocks * size + positions % size
        self.query_start_loc.host[0] = 0
        self.query_start_loc.host[1 : requests + 1] = ends
        self.seq_lens.host[:requests] = lengths

    def _write_padding(self, tokens: int, requests: int, to_tokens: int, to_requests: int) -> None:
        for each in self._per_token:
            each.host[tokens:to_tokens] = 0
        self.query_start_loc.host[requests + 1 : to_requests + 1] = tokens
        self.seq_lens.host[requests:to_requests] = 0

    def _upload(
        self,
        before: list[tuple[int, int]],
        edits: tuple[Ints, Ints],
        behind: list[tuple[int, int]],
    ) -> None:
        """Send the arrays that lie before and behind the edits of block tables, and the edits."""
        if self._arena.shared:
            return
        count = len(edits[0])
        arrays = (self._edit_places, self._edit_values)
        if 0 < count <= EDITS:
            for array, new in zip(arrays, edits, strict=True):
                array.host[:count] = new
                before.append(array.span(0, count))
        self._arena.upload(before + behind)
        if count:
            places, values = (
                [each.device[:count] for each in arrays]
                if count <= EDITS
                else [to_device(each, self.platform) for each in edits]
            )
            self._flat_tables.index_copy_(0, places, values)
