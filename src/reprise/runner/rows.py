"""Where each request stands: on the device, and what the host knows of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reprise.cache.layout import TableLayout
from reprise.ops.step import ACCEPTED, COMPUTED, LIMIT, NEXT, PROMPT
from reprise.platforms import Platform
from reprise.runner.arena import Ints, to_device
from reprise.runner.kinds import RowLayouts
from reprise.step import Admission, Step

FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
"""Parameters of a request's draws."""
_INT32_MAX = np.iinfo(np.int32).max


class Rows:
    """What lies on the device from step to step, a row for each request; row 0 is no request's.

    The device moves rows on by itself (``ops.advance``). The host knows of each row how far its
    request has come at least and at most; both are the same unless drafts are under way.

    Args:
        max_requests: Most requests at a time.
        max_blocks: Most entries of a block table.
        num_drafts: K, most tokens that are drafted behind a request's newest one.
        tables: The L block tables of a request.
        platform: The device.
    """

    def __init__(
        self,
        max_requests: int,
        max_blocks: int,
        num_drafts: int,
        tables: Sequence[TableLayout],
        platform: Platform,
    ) -> None:
        self.count = max_requests + 1
        device = platform.device
        self._platform = platform
        self.num_drafts = num_drafts
        seeds = NEXT + 1 + num_drafts
        self._top_k, self._seed = seeds + 1, seeds
        self.integers = torch.zeros(seeds + 2, self.count, dtype=torch.int64, device=device)
        """All integers of each row, so that an admission takes one launch."""
        self.numbers = self.integers[:seeds]
        """What ``ops.lay_out`` reads and ``ops.advance`` changes."""
        self.floats = torch.zeros(len(FLOATS), self.count, dtype=torch.float32, device=device)
        shape = (len(tables), self.count, max_blocks)
        self.tables = torch.zeros(shape, dtype=torch.int32, device=device)
        """[L, S, M]: the cache blocks of each request."""
        self.host_tables: Ints = np.zeros(shape, dtype=np.int32)
        """The same as the host knows it."""
        self.layouts = [RowLayouts(self.count) for _ in tables]
        """Of each table."""
        self._gives_back = [each.lifetime.bounded for each in tables]
        self.admitted: list[Admission | None] = [None] * self.count
        self.at_least: Ints = np.zeros(self.count, dtype=np.int64)
        """Tokens that are computed once all submitted steps have run."""
        self.at_most: Ints = self.at_least.copy() if num_drafts else self.at_least
        self.verified: Ints = np.zeros(self.count, dtype=bool)
        """Whether each row may have tokens beside its states: its last step verified drafts (how
        many count, the device knows), or the states were copied behind such a step."""
        self._lives: Ints = np.zeros(self.count, dtype=np.int64)
        """How many requests each row has had."""

    def arrays(self) -> dict[str, Tensor]:
        """All device memory of this, by name."""
        return {
            "rows' integers": self.integers,
            "rows' floats": self.floats,
            "rows' tables": self.tables,
        }

    def parameters(self, rows: Tensor) -> dict[str, Tensor]:
        """Of the draws of ``rows`` [N] int64: :data:`FLOATS`, ``top_k`` int32 and ``seed``."""
        found = dict(zip(FLOATS, self.floats.index_select(1, rows), strict=True))
        seed, top_k = self.integers[self._seed :].index_select(1, rows)
        return {**found, "seed": seed, "top_k": top_k.int()}

    def admit(self, admission: Admission) -> None:
        """Note a request on the host; its row on the device is written from :meth:`columns`."""
        row = admission.row
        self.admitted[row] = admission
        self.at_least[row] = self.at_most[row] = admission.start
        self.verified[row] = admission.replay > 0
        self._lives[row] += 1

    def columns(self, admitted: Sequence[Admission]) -> tuple[Ints, Ints]:
        """What :attr:`integers` and :attr:`floats` have of these: [C, A] int64, [F, A] float32."""
        integers = np.zeros((len(self.integers), len(admitted)), dtype=np.int64)
        integers[NEXT : self._seed] = -1
        floats = np.empty((len(FLOATS), len(admitted)), dtype=np.float32)
        for number, each in enumerate(admitted):
            params = each.params
            column = integers[:, number]
            column[COMPUTED], column[LIMIT] = each.start, each.limit
            column[PROMPT], column[ACCEPTED] = each.num_prompt_tokens, each.replay
            column[self._seed] = each.seed
            column[self._top_k] = min(max(params.top_k, 0), _INT32_MAX)
            floats[:, number] = (
                0.0 if params.greedy else params.temperature,
                params.top_p,
                params.min_p,
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            )
        return integers, floats

    def clear_tables(self, rows: Ints) -> None:
        """These rows get new owners: no block of the last ones' is in their tables any more."""
        self.host_tables[:, rows] = 0
        self.tables.index_fill_(1, to_device(rows, self._platform), 0)

    def clear(self) -> None:
        """Make all rows as they were first, whatever was written there: no request has one."""
        for each in (self.integers, self.floats, self.tables):
            each.zero_()

    def edit(self, step: Step) -> tuple[Ints, Ints]:
        """Note the step's new entries of block tables; returns their places in the flat tables and
        what they are."""
        _, count, width = self.tables.shape
        places: list[int] = []
        values: list[int] = []
        for number, edits in enumerate(step.edits):
            layouts = self.layouts[number]
            for each in edits:
                row, begin, blocks = each.row, each.begin, each.blocks
                table = self.host_tables[number, row]
                first = (number * count + row) * width + begin
                places += range(first, first + len(blocks))
                values += blocks
                table[begin : begin + len(blocks)] = blocks
                if self._gives_back[number]:
                    layouts.replace(row, table[: begin + len(blocks)])
                else:
                    layouts.extend(row, blocks, int(table[begin - 1]) if begin else None)
        return np.array(places, dtype=np.int64), np.array(values, dtype=np.int32)

    def move_on(self, rows: Ints | slice, least: Ints, most: Ints) -> None:
        """A step was submitted that computes so many tokens of each row, at least and at most."""
        self.at_least[rows] += least
        if self.num_drafts:
            self.at_most[rows] += most

    def lives(self, rows: Ints) -> Ints:
        """For :meth:`settle`: which of each row's requests it is."""
        return self._lives[rows]

    def settle(self, rows: Ints, lives: Ints, accepted: Ints, rejected: Ints) -> None:
        """It is known of a step how many drafts counted; rows that are others' now stay."""
        same = self._lives[rows] == lives
        self.at_least[rows] += accepted * same
        self.at_most[rows] -= rejected * same
