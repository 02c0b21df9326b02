"""The scheduler's steps, written into the inputs that graphs read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.cache import CacheLayout
from reprise.platforms import Platform
from reprise.runner.arena import Ints, to_device
from reprise.runner.rows import Rows
from reprise.runner.step_inputs import StepInputs
from reprise.shape import StepShape
from reprise.step import Step

EDITS = 1024
"""Entries of block tables that travel with a step's other inputs; more take a copy of their own."""
ADMISSIONS = 64
"""New requests that do; more take a copy of their own."""


class StepBuffers(StepInputs):
    """The inputs of the scheduler's steps.

    A step says which rows compute how many tokens. Where they stand the device knows (:attr:`rows`)
    and writes itself (``ops.lay_out``), so that a decode step of the same rows as the one before
    sends nothing.

    Args:
        max_tokens: Most new tokens in a step.
        max_requests: Most requests in a step.
        max_model_len: Most tokens of a request.
        layout: Block tables and pools.
        platform: Where the device side lives.
        shared: Whether the device reads host memory; None: as the platform's does.
        num_drafts: Most tokens that are drafted behind a request's newest one.
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
    ) -> None:
        max_blocks = max(each.entries(max_model_len + num_drafts) for each in layout.tables)
        rows = Rows(max_requests, max_blocks, num_drafts, layout.tables, platform)
        self._admissions = min(ADMISSIONS, max_requests)
        super().__init__(
            rows, max_tokens, max_requests, max_model_len, layout, platform, shared=shared,
            further={
                "first_draw": (max_requests + 1, torch.int32),
                "sampling_rows": (min(max_tokens, max_requests * (1 + num_drafts)), torch.int64),
                "admitted_rows": (self._admissions, torch.int64),
                "admitted_integers": (self._admissions * len(rows.integers), torch.int64),
                "admitted_floats": (self._admissions * len(rows.floats), torch.float32),
                "edit_places": (EDITS, torch.int64),
                "edit_values": (EDITS, torch.int32),
            },
        )  # fmt: skip
        self._first_draw, self._sampling_rows = (
            self._arrays[name] for name in ("first_draw", "sampling_rows")
        )
        self._admitted_rows, self._admitted_integers, self._admitted_floats = (
            self._arrays[f"admitted_{name}"] for name in ("rows", "integers", "floats")
        )
        self._edit_places, self._edit_values = (
            self._arrays[f"edit_{name}"] for name in ("places", "values")
        )
        device = platform.device
        self.draws = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        """Of the token drawn behind each token, its number among those of its request."""
        self.emitted = torch.zeros(max_requests, 2 + num_drafts, dtype=torch.int64, device=device)
        """New tokens of each of the step's requests, -1 behind them, and how many were drafted."""
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
        """Send all that the device needs to know of a step, in one copy if it is not too much."""
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

    def example(self, shape: StepShape) -> None:
        """Lay out a step of the null row, and move that on, which changes nothing."""
        self._lay_out(shape)
        ops.advance(*self._advance_arguments(shape.num_requests), self.draws[:0])
        self.forget()

    def arrays(self) -> dict[str, Tensor]:
        return {**super().arrays(), "draws": self.draws}
