"""Tensors that keep their addresses: a step is written into them, a graph reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.cache import NULL_BLOCK, Batch, CacheLayout, Table
from reprise.graphs.kinds import Kind
from reprise.platforms import Platform
from reprise.runner.arena import Arena, Ints, to_device
from reprise.runner.known_step import KnownStep
from reprise.runner.rows import Rows
from reprise.shape import StepShape
from reprise.step import Step

EDITS = 1024
"""Entries of block tables that travel with a step's other inputs; more take a copy of their own."""
ADMISSIONS = 64
"""Likewise requests."""


class StepBuffers:
    """The inputs of one step, for at most ``max_tokens`` tokens of ``max_requests`` requests.

    A step says which rows compute how many tokens. Where they stand the device knows (:attr:`rows`)
    and writes itself (``ops.lay_out``), so that a decode step of the same rows as the one before
    sends nothing. What is sent lies side by side in an arena: one copy to the device.

    Args:
        max_tokens: Most new tokens in a step.
        max_requests: Most requests in a step.
        max_model_len: Most tokens of a request.
        layout: Block tables and pools.
        platform: Where the device side lives.
        shared: Whether the device reads host memory; None: as the platform's does.
        num_drafts: Most tokens that are drafted behind a request's newest one.
        rows: Where requests stand, if others know already; None: new ones.
    """

    def __init__(
        self,
        max_tokens: int,
        max_requests: int,
        max_model_len: int,
        layout: CacheLayout,
        platform: Platform,
        shared: bool | None = None,
        num_drafts: int = 0,
        rows: Rows | None = None,
    ) -> None:
        self.layout = layout
        self.max_tokens, self.max_requests = max_tokens, max_requests
        self.platform = platform
        max_blocks = max(each.entries(max_model_len + num_drafts) for each in layout.tables)
        if rows is None:
            rows = Rows(max_requests, max_blocks, num_drafts, layout.tables, platform)
        self.rows = rows
        self.known = KnownStep(self.rows, layout, max_model_len + num_drafts)
        self._admissions = min(ADMISSIONS, max_requests)
        num_integers, num_floats = len(self.rows.integers), len(self.rows.floats)
        num_tables = len(layout.tables)
        per_request, per_token = (max_requests, torch.int32), (max_tokens, torch.int64)
        self._arena = Arena(
            [
                (max_requests + 1, torch.int32),
                (max_requests, torch.int64),
                per_request,
                (max_requests + 1, torch.int32),
                (min(max_tokens, max_requests * (1 + num_drafts)), torch.int64),
                (self._admissions, torch.int64),
                (self._admissions * num_integers, torch.int64),
                (self._admissions * num_floats, torch.float32),
                (EDITS, torch.int64),
                (EDITS, torch.int32),
                per_token,
                # What follows is written on the device, but for made-up steps.
                per_token,
                per_request,
                per_request,
                (max_requests, torch.bool),
                (num_tables * max_tokens, torch.int64),
            ],
            platform,
            shared,
        )
        (
            self.query_start_loc,
            self._rows,
            self._known,
            self._first_draw,
            self._sampling_rows,
            self._admitted_rows,
            self._admitted_integers,
            self._admitted_floats,
            self._edit_places,
            self._edit_values,
            self.input_ids,
            self.positions,
            self.seq_lens,
            self._accepted,
            self._fresh,
            self._slots,
        ) = self._arena.arrays
        self.shared = self._arena.shared
        """The device reads host memory."""
        self._per_token = (self.input_ids, self.positions)
        self.slots = self._slots.device.view(num_tables, max_tokens)
        """[L, T] int64: of each table, where each token's rows go."""
        self._per_request = (self.seq_lens, self._accepted, self._fresh, self._known)
        device = platform.device
        self.draws = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        """Of the token drawn behind each token, its number among those of its request."""
        self.emitted = torch.zeros(max_requests, 2 + num_drafts, dtype=torch.int64, device=device)
        """New tokens of each of the step's requests, -1 behind them, and how many were drafted."""
        self.block_tables = torch.zeros(
            num_tables, max_requests, max_blocks, dtype=torch.int32, device=device
        )
        """Those of the step's rows."""
        self._block_sizes = to_device(
            np.array([each.span for each in layout.tables], dtype=np.int64), platform
        )
        self._last_rows: Sequence[int] = ()
        """Of the last step, if it was a decode step whose inputs are still there."""
        self._padded: tuple[StepShape, StepShape] | None = None
        """The step in the buffers, and what it was padded to."""
        self._again: Callable[[], None] | None = None
        """Lays the step out that was laid out last, as its rows stand now."""
        self.new_tokens, self.numbers = self.emitted[:0, :-1], self.draws[:0]
        """Of the step that was filled last: [R, 1 + K], those of :attr:`emitted`; and [T], of
        :attr:`draws`."""
        self.none_drawn = self.draws[:0]
        self._num_tokens = 0
        self._starts: Ints = np.zeros(0, dtype=np.int64)
        """How many tokens of each request come before the step's, at least."""
        self.num_draws = 0
        """Rows of the step's logits that are drawn from."""
        self._advanced: tuple[Tensor, ...] = ()
        """Arguments of ``ops.advance`` before what was drawn."""
        self._move: Callable[[Tensor], None] | None = None
        """Moves the rows of the step on that was filled last."""

    # ---- a step of the scheduler ---------------------------------------------------------

    def fill(self, step: Step, shape: StepShape, padded: StepShape) -> None:
        """Write a step's requests in their order, and padding behind them.

        Args:
            step: What to compute.
            shape: Its shape.
            padded: The shape up to which there is padding.
        """
        shapes = shape, padded
        for each in step.admitted:
            self.rows.admit(each)
        edits = self.rows.edit(step) if any(step.edits) else None
        if step.rows == self._last_rows and shapes == self._padded and not step.admitted:
            if edits is not None:
                self._arena.flip()
                self._send_edits(edits, [])
                self._gather(padded.num_requests)
                self.known.tables_changed()
            self.known.go_on()
            assert self._again is not None
            self._again()
            return
        self._write(step, padded, edits)
        self._padded = shapes
        self._last_rows = list(step.rows) if step.num_decodes == len(step.rows) else ()

    def _write(self, step: Step, padded: StepShape, edits: tuple[Ints, Ints] | None) -> None:
        self._arena.flip()
        requests, tokens = len(step.rows), step.num_tokens
        rows = np.array(step.rows, dtype=np.int64)
        counts = np.array(step.counts, dtype=np.int64)
        drafts = np.array(step.drafts, dtype=np.int64)
        ends = np.cumsum(counts + drafts)
        known = counts.copy()
        known[: step.num_decodes] = 0
        starts = self._starts = self.rows.at_least[rows]
        draws = np.where(step.samples, 1 + drafts, 0)
        self.num_draws, self._num_tokens = int(draws.sum()), tokens

        to_requests = max(requests, padded.num_requests)
        for array, values, behind in (
            (self._rows, rows, 0),
            (self._known, known, 0),
        ):
            array.host[:requests] = values
            array.host[requests:to_requests] = behind
        for array, values in ((self.query_start_loc, ends), (self._first_draw, np.cumsum(draws))):
            array.host[0] = 0
            array.host[1 : requests + 1] = values
            array.host[requests + 1 : to_requests + 1] = values[-1] if requests else 0
        spans = [
            self.query_start_loc.span(0, to_requests + 1),
            self._rows.span(0, to_requests),
            self._known.span(0, to_requests),
            self._first_draw.span(0, to_requests + 1),
        ]
        if self.num_draws < tokens:
            which = np.repeat(np.arange(requests), draws)
            within = np.arange(self.num_draws) - (np.cumsum(draws) - draws)[which]
            self._sampling_rows.host[: self.num_draws] = (ends - draws)[which] + within
            spans.append(self._sampling_rows.span(0, self.num_draws))
        self._send(step, spans, edits, self._write_ids(step, ends, starts))
        self._gather(to_requests)
        plain = not self.rows.num_drafts and step.num_decodes == requests
        self.known.begin(rows, counts + drafts, counts, known == 0, plain=plain)
        self._lay_out(padded)
        self._advanced = self._advance_arguments(requests)
        self.new_tokens = self.emitted[:requests, :-1]
        self.numbers = self.draws[:tokens]
        self._move = None

    def _write_ids(self, step: Step, ends: Ints, starts: Ints) -> list[tuple[int, int]]:
        """The known tokens, on the host; returns where they are."""
        if step.num_decodes == len(step.rows):
            return []
        first = int(ends[step.num_decodes - 1]) if step.num_decodes else 0
        for number in range(step.num_decodes, len(step.rows)):
            admission = self.rows.admitted[step.rows[number]]
            assert admission is not None, "a row computes known tokens of its admission"
            count, end, start = step.counts[number], int(ends[number]), int(starts[number])
            self.input_ids.host[end - count : end] = admission.token_ids[start : start + count]
        return [self.input_ids.span(first, step.num_tokens)]

    def _send(
        self,
        step: Step,
        before: list[tuple[int, int]],
        edits: tuple[Ints, Ints] | None,
        behind: list[tuple[int, int]],
    ) -> None:
        """All that the device needs to know of a step, in one copy if it is not too much."""
        admitted = step.admitted
        count = len(admitted)
        staged = 0 < count <= self._admissions
        integers = floats = np.zeros(0)
        if count:
            rows = np.array([each.row for each in admitted], dtype=np.int64)
            integers, floats = self.rows.columns(admitted)
            if staged:
                self._admitted_rows.host[:count] = rows
                self._admitted_integers.host[: integers.size] = integers.reshape(-1)
                self._admitted_floats.host[: floats.size] = floats.reshape(-1)
                before += [
                    self._admitted_rows.span(0, count),
                    self._admitted_integers.span(0, integers.size),
                    self._admitted_floats.span(0, floats.size),
                ]
        self._send_edits(edits, before, behind)
        if not count:
            return
        if staged:
            arrays = [
                self._admitted_rows.device[:count],
                self._admitted_integers.device[: integers.size].view(integers.shape),
                self._admitted_floats.device[: floats.size].view(floats.shape),
            ]
        else:
            arrays = [to_device(each, self.platform) for each in (rows, integers, floats)]
        self.rows.integers.index_copy_(1, arrays[0], arrays[1])
        self.rows.floats.index_copy_(1, arrays[0], arrays[2])

    def _send_edits(
        self,
        edits: tuple[Ints, Ints] | None,
        before: list[tuple[int, int]],
        behind: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Send the arrays that lie before and behind the edits of block tables, and the edits."""
        count = 0 if edits is None else len(edits[0])
        arrays = (self._edit_places, self._edit_values)
        if edits is not None and 0 < count <= EDITS:
            for array, new in zip(arrays, edits, strict=True):
                array.host[:count] = new
                before.append(array.span(0, count))
        spans = [*before, *behind]
        if spans:
            self._arena.upload(spans)
        if edits is not None and count:
            places, values = (
                [each.device[:count] for each in arrays]
                if count <= EDITS
                else [to_device(each, self.platform) for each in edits]
            )
            self.rows.tables.view(-1).index_copy_(0, places, values)

    def _gather(self, requests: int) -> None:
        """The block tables of the step's rows, side by side, as kernels of any origin take them."""
        rows = self._rows.device[:requests]
        for whole, part in zip(self.rows.tables, self.block_tables, strict=True):
            torch.index_select(whole, 0, rows, out=part[:requests])

    def _lay_out(self, padded: StepShape) -> None:
        tokens, requests = padded.num_tokens, padded.num_requests
        arguments = (
            self.rows.numbers,
            self._rows.device[:requests],
            self._known.device[:requests],
            self.query_start_loc.device[: requests + 1],
            self.block_tables[:, :requests],
            self._block_sizes,
            self.input_ids.device[:tokens],
            self.positions.device[:tokens],
            self.draws[:tokens],
            self.slots[:, :tokens],
            self.seq_lens.device[:requests],
            self._accepted.device[:requests],
            self._fresh.device[:requests],
            padded.query_len,
        )
        self._again = ops.lay_out.repeatedly(*arguments)

    def _advance_arguments(self, requests: int) -> tuple[Tensor, ...]:
        return (
            self.rows.numbers,
            self._rows.device[:requests],
            self._known.device[:requests],
            self._first_draw.device[: requests + 1],
            self.emitted[:requests],
        )

    def advance(self, drawn: Tensor) -> Tensor:
        """Move the rows of the step that was filled last on.

        Args:
            drawn: [D] int64, what was drawn from its logits.

        Returns:
            [R, 1 + K + 1] int64, see :attr:`emitted`; overwritten by the next step.
        """
        if self._advanced[-1].shape[0] == 0:
            return self.emitted[:0]
        if self._move is None:
            self._move = ops.advance.repeatedly(*self._advanced, drawn, others=1)
        else:
            self._move(drawn)
        return self._advanced[-1]

    def starts(self, number: int) -> int:
        """Where a request of the step that was filled last, which computes known tokens, began."""
        return int(self._starts[number])

    @property
    def rows_and_draws(self) -> tuple[Tensor, Tensor]:
        """Of the step that was filled last, [R] int64, the requests' rows, and [R + 1] int32, where
        the draws of each begin."""
        return self._advanced[1], self._advanced[3]

    def sampling_rows(self) -> Tensor | None:
        """[D] int64: of the step that was filled last, the tokens behind which one is drawn; None:
        behind every token."""
        if self.num_draws == self._num_tokens:
            return None
        return self._sampling_rows.device[: self.num_draws]

    # ---- made-up steps -------------------------------------------------------------------

    def example(self, shape: StepShape) -> None:
        """Lay out a step of the null row, and move that on, which changes nothing."""
        self._lay_out(shape)
        ops.advance(*self._advance_arguments(shape.num_requests), self.draws[:0])
        self.forget()

    def fill_rows(
        self,
        counts: Ints,
        lengths: Ints,
        tables: Sequence[Ints],
        token_ids: Ints,
        known: Ints,
        accepted: Ints,
    ) -> None:
        """Write a made-up step.

        Args:
            counts: [R], new tokens of each request.
            lengths: [R], tokens of each request, the new ones included.
            tables: [R, M] int32 of each table, blocks of each request.
            token_ids: [T], the new tokens.
            known: [R], how many of each request's are known; 0: it verifies drafts.
            accepted: [R], of each request's last step, how many tokens count; 0: all, being known.
        """
        self._arena.flip()
        self.forget()
        requests = len(counts)
        ends = np.cumsum(counts)
        tokens = int(ends[-1])
        which = np.repeat(np.arange(requests), counts)
        starts = lengths - counts
        positions = np.arange(tokens) + (lengths - ends)[which]
        self.query_start_loc.host[0] = 0
        for array, values in (
            (self.query_start_loc, ends),
            (self._rows, np.arange(1, requests + 1)),
            (self.seq_lens, lengths),
            (self._accepted, accepted),
            (self._known, known),
            (self._fresh, starts == 0),
            (self.input_ids, token_ids),
            (self.positions, positions),
        ):
            first = 1 if array is self.query_start_loc else 0
            array.host[first : first + len(values)] = values
        slots = []
        for number, (table, layout) in enumerate(zip(tables, self.layout.tables, strict=True)):
            blocks = table[which, positions // layout.span].astype(np.int64)
            first = number * self.max_tokens
            self._slots.host[first : first + tokens] = (
                blocks * layout.span + positions % layout.span
            )
            slots.append(self._slots.span(first, first + tokens))
        self._arena.upload(
            [
                self.query_start_loc.span(0, requests + 1),
                self._rows.span(0, requests),
                *(each.span(0, tokens) for each in self._per_token),
                *(each.span(0, requests) for each in self._per_request),
                *slots,
            ]
        )
        width = self.block_tables.shape[2]
        wholes = []
        for table, target in zip(tables, self.block_tables, strict=True):
            whole = np.zeros((requests, width), dtype=np.int32)
            whole[:, : table.shape[1]] = table
            self.platform.upload(torch.from_numpy(whole), target[:requests])
            wholes.append(whole)
        self.known.make_up(counts, starts, wholes, known == 0, accepted)

    def fill_padding(self, live: StepShape, bucket: StepShape) -> None:
        """Make the rows from a step's end to a bucket's end harmless: null blocks, length 0."""
        if self._padded == (live, bucket):
            return
        # Rows are overwritten that the next step might have continued.
        self.forget()
        self._arena.flip()  # of another step's padding copies may be under way
        tokens, requests = live.num_tokens, live.num_requests
        to_tokens, to_requests = bucket.num_tokens, bucket.num_requests
        self.query_start_loc.host[requests + 1 : to_requests + 1] = tokens
        spans = [self.query_start_loc.span(requests + 1, to_requests + 1)]
        for each in (self._rows, *self._per_request):
            each.host[requests:to_requests] = 0
            spans.append(each.span(requests, to_requests))
        for each in self._per_token:
            each.host[tokens:to_tokens] = 0
            spans.append(each.span(tokens, to_tokens))
        for first in range(0, self.slots.numel(), self.max_tokens):
            self._slots.host[first + tokens : first + to_tokens] = 0
            spans.append(self._slots.span(first + tokens, first + to_tokens))
        for span in spans:
            # Each alone: between them lie values that only the device knows.
            self._arena.upload([span])
        self.block_tables[:, requests:to_requests] = 0

    # ---- what others read ----------------------------------------------------------------

    def kind(self, bucket: StepShape, *, exact: bool = False) -> Kind:
        """The kind of the step that was filled last, padded to ``bucket``; ``exact``: as the device
        knows it, which is waited for where the host does not."""
        if not exact or not self.rows.num_drafts:
            return self.known.kind(bucket)
        requests = self.known.num_requests
        lengths, accepted = (
            each.device[:requests].cpu().numpy() for each in (self.seq_lens, self._accepted)
        )
        return self.known.kind(bucket, (lengths, accepted))

    def use_cache(self, layout: CacheLayout) -> None:
        """The pools have these sizes from now on."""
        self.layout = self.known.layout = layout
        for table, each in zip(layout.tables, self.rows.layouts, strict=True):
            each.use_cache(layout.pools[table.pool].num_blocks)

    def used_blocks(self) -> list[int]:
        """Of each pool, up to which block any has been used."""
        used = [1] * len(self.layout.pools)
        for table, each in zip(self.layout.tables, self.rows.layouts, strict=True):
            # Copies of states are in no table.
            every = self.layout.pools[table.pool].num_blocks
            count = every if table.lifetime.rewritten else each.highest + 2
            used[table.pool] = max(used[table.pool], count)
        return used

    def touched_blocks(self) -> list[int]:
        """Of each pool, how many blocks from the first on may hold what requests have left."""
        touched = [0] * len(self.layout.pools)
        for table, each in zip(self.layout.tables, self.rows.layouts, strict=True):
            if each.highest == NULL_BLOCK:
                continue
            # Copies of states are in no table.
            every = self.layout.pools[table.pool].num_blocks
            count = every if table.lifetime.rewritten else each.highest + 1
            touched[table.pool] = max(touched[table.pool], count)
        return touched

    def arrays(self) -> dict[str, Tensor]:
        """All device memory of this, by name."""
        names = (
            "query_start_loc", "rows", "known", "first_draw", "sampling_rows", "admitted_rows",
            "admitted_integers", "admitted_floats", "edit_places", "edit_values", "input_ids",
            "positions", "seq_lens", "accepted", "fresh", "slots",
        )  # fmt: skip
        arrays = dict(zip(names, (each.device for each in self._arena.arrays), strict=True))
        return {
            **arrays, "block_tables": self.block_tables, "draws": self.draws,
            "block_sizes": self._block_sizes, **self.rows.arrays(),
        }  # fmt: skip

    def batch(self, tokens: int, requests: int, query_len: int) -> Batch:
        """Views of the device side for a step of this size."""
        tables = tuple(
            Table(
                self.states(number, requests) if each.lifetime.rewritten else blocks[:requests],
                slots[:tokens],
            )
            for number, (each, blocks, slots) in enumerate(
                zip(self.layout.tables, self.block_tables, self.slots, strict=True)
            )
        )
        return Batch(
            token_ids=self.input_ids.device[:tokens],
            positions=self.positions.device[:tokens],
            rows=self._rows.device[:requests],
            query_start_loc=self.query_start_loc.device[: requests + 1],
            seq_lens=self.seq_lens.device[:requests],
            accepted=self._accepted.device[:requests],
            known=self._known.device[:requests],
            fresh=self._fresh.device[:requests],
            tables=tables,
            query_len=query_len,
        )

    def states(self, table: int, requests: int) -> Tensor:
        """[R] int32, strided: of a table of states the row of each request that a step rewrites."""
        return self.block_tables[table, :requests, 0]

    def views(self, tokens: int, requests: int) -> dict[str, Tensor]:
        """The device side of every input, cut to a step of this size."""
        return {
            "input_ids": self.input_ids.device[:tokens],
            "positions": self.positions.device[:tokens],
            "rows": self._rows.device[:requests],
            "query_start_loc": self.query_start_loc.device[: requests + 1],
            "seq_lens": self.seq_lens.device[:requests],
            "accepted": self._accepted.device[:requests],
            "known": self._known.device[:requests],
            "fresh": self._fresh.device[:requests],
            **{
                f"{name}{number or ''}": each
                for number, (blocks, slots) in enumerate(
                    zip(self.block_tables, self.slots, strict=True)
                )
                for name, each in (
                    ("slot_mapping", slots[:tokens]),
                    ("block_tables", blocks[:requests]),
                )
            },
        }

    def forget(self) -> None:
        """The device's inputs were overwritten, or a step failed half-way: the next step is
        written anew."""
        self._last_rows = ()
        self._padded = self._again = None
