"""Tensors that keep their addresses: what a step computes is written into them, a graph reads them,
and made-up steps and padding look like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from reprise.cache import NULL_BLOCK, Batch, CacheLayout, Table
from reprise.graphs.kinds import Kind
from reprise.platforms import Platform
from reprise.runner.arena import Arena, Ints, to_device
from reprise.runner.known_step import KnownStep
from reprise.runner.rows import Rows
from reprise.shape import StepShape


class StepInputs:
    """The inputs of one step, for at most ``max_tokens`` tokens of ``max_requests`` requests.

    What is sent to the device lies side by side in an arena: one copy. A subclass fills them for
    live steps (:class:`reprise.runner.buffers.StepBuffers` for those of the scheduler); made-up
    steps and padding are alike for all.

    Args:
        rows: Where requests stand.
        max_tokens: Most new tokens in a step.
        max_requests: Most requests in a step.
        max_model_len: Most tokens of a request.
        layout: Block tables and pools.
        platform: Where the device side lives.
        shared: Whether the device reads host memory; None: as the platform's does.
        further: By name, length and dtype of what else is sent with the inputs.
    """

    def __init__(
        self,
        rows: Rows,
        max_tokens: int,
        max_requests: int,
        max_model_len: int,
        layout: CacheLayout,
        platform: Platform,
        *,
        shared: bool | None = None,
        further: Mapping[str, tuple[int, torch.dtype]] | None = None,
    ) -> None:
        self.layout = layout
        self.max_tokens, self.max_requests = max_tokens, max_requests
        self.platform = platform
        self.rows = rows
        self.known = KnownStep(rows, layout, max_model_len + rows.num_drafts)
        num_tables, _, max_blocks = rows.tables.shape
        per_request, per_token = (max_requests, torch.int32), (max_tokens, torch.int64)
        arrays = {
            "query_start_loc": (max_requests + 1, torch.int32),
            "rows": (max_requests, torch.int64),
            "known": per_request,
            **(further or {}),
            "input_ids": per_token,
            # What follows is written on the device, but for made-up steps.
            "positions": per_token,
            "seq_lens": per_request,
            "accepted": per_request,
            "fresh": (max_requests, torch.bool),
            "slots": (num_tables * max_tokens, torch.int64),
        }
        self._arena = Arena(list(arrays.values()), platform, shared)
        self._arrays = dict(zip(arrays, self._arena.arrays, strict=True))
        self.query_start_loc = self._arrays["query_start_loc"]
        self._rows, self._known = self._arrays["rows"], self._arrays["known"]
        self.input_ids, self.positions = self._arrays["input_ids"], self._arrays["positions"]
        self.seq_lens, self._accepted = self._arrays["seq_lens"], self._arrays["accepted"]
        self._fresh, self._slots = self._arrays["fresh"], self._arrays["slots"]
        self.shared = self._arena.shared
        """The device reads host memory."""
        self._per_token = (self.input_ids, self.positions)
        self.slots = self._slots.device.view(num_tables, max_tokens)
        """[L, T] int64: of each table, where each token's rows go."""
        self._per_request = (self.seq_lens, self._accepted, self._fresh, self._known)
        self.block_tables = torch.zeros(
            num_tables, max_requests, max_blocks, dtype=torch.int32, device=platform.device
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

    # ---- made-up steps -------------------------------------------------------------------

    def fill_rows(
        self,
        counts: Ints,
        lengths: Ints,
        tables: Sequence[Ints],
        token_ids: Ints,
        known: Ints,
        accepted: Ints,
        padded: tuple[StepShape, StepShape] | None = None,
    ) -> None:
        """Write a made-up step.

        Args:
            counts: [R], new tokens of each request.
            lengths: [R], tokens of each request, the new ones included.
            tables: [R, M] int32 of each table, blocks of each request.
            token_ids: [T], the new tokens.
            known: [R], how many of each request's are known; 0: it verifies drafts.
            accepted: [R], of each request's last step, how many tokens count; 0: all, being known.
            padded: Its shape, and what it is padded to, as by :meth:`fill_padding`: here the host
                knows all values, so that they are sent together.
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
                *(self._pad(*padded) if padded else ()),
            ]
        )
        width = self.block_tables.shape[2]
        wholes = []
        for table, target in zip(tables, self.block_tables, strict=True):
            whole = np.zeros((requests, width), dtype=np.int32)
            whole[:, : table.shape[1]] = table
            to_device(whole, self.platform, target[:requests])
            wholes.append(whole)
        self.known.make_up(counts, starts, wholes, known == 0, accepted)

    def fill_padding(self, live: StepShape, bucket: StepShape) -> None:
        """Make the rows from a step's end to a bucket's end harmless: null blocks, length 0."""
        if self._padded == (live, bucket):
            return
        # Rows are overwritten that the next step might have continued.
        self.forget()
        self._arena.flip()  # of another step's padding copies may be under way
        for span in self._pad(live, bucket):
            # Each alone: between them lie values that only the device knows.
            self._arena.upload([span])

    def _pad(self, live: StepShape, bucket: StepShape) -> list[tuple[int, int]]:
        """Write padding on the host, but block tables; where it lies in the arena."""
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
        self.block_tables[:, requests:to_requests] = 0
        return spans

    def _gather(self, requests: int) -> None:
        """The block tables of the step's rows, side by side, as kernels of any origin take them."""
        rows = self._rows.device[:requests]
        for whole, part in zip(self.rows.tables, self.block_tables, strict=True):
            torch.index_select(whole, 0, rows, out=part[:requests])

    # ---- what others read ----------------------------------------------------------------

    def kind(self, bucket: StepShape, *, exact: bool = False) -> Kind | None:
        """The kind of the step that was filled last, padded to ``bucket``; ``exact``: as the device
        knows it, which is waited for where the host does not. None: a request of it is at its end,
        of which the host does not know yet, and has length 0, as padding has."""
        if not exact or not self.rows.num_drafts:
            return self.known.kind(bucket)
        requests = self.known.num_requests
        lengths, accepted = (
            each.device[:requests].cpu().numpy() for each in (self.seq_lens, self._accepted)
        )
        return self.known.kind(bucket, (lengths, accepted)) if lengths.all() else None

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
        return {
            **{name: each.device for name, each in self._arrays.items()},
            "block_tables": self.block_tables,
            "block_sizes": self._block_sizes,
            **self.rows.arrays(),
        }

    def batch(self, tokens: int, requests: int, query_len: int, prompt: bool = False) -> Batch:
        """Views of the device side for a step of this size; ``prompt``: see :class:`StepShape`."""
        most = self.block_tables.shape[2]
        # Larger blocks are fewer: what reads a table goes by its width.
        spans = [each.block_size for each in self.layout.tables if not each.lifetime.rewritten]
        tables = tuple(
            Table(
                self.states(number, requests)
                if each.lifetime.rewritten
                else blocks[:requests, : -(-most * min(spans) // each.block_size)],
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
            prompt=tokens if prompt else 0,
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
