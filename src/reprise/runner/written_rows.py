"""What a step writes in the caches, to be compared and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reprise.cache.layout import CacheLayout
from reprise.graphs.regions import Stack, Units
from reprise.runner.arena import to_device
from reprise.runner.buffers import StepBuffers
from reprise.shape import StepShape


@dataclass(frozen=True)
class _Rows:
    """Rows of one table in tensors of equal layout."""

    names: Sequence[str]
    tensor: Tensor
    """[C, N, ...], a view of the caches."""
    places: Tensor
    """[K] int64: those that the step writes."""
    of_requests: bool
    """A row is a request's, not a token's."""


class WrittenRows:
    """The cache rows that the current inputs write, in every layer: each token's, or where a
    request's state is rewritten, each request's.

    Args:
        layout: Tables and pools.
        stacks: Of each pool the caches, [C, N, ...] each.
        buffers: Hold the step.
        bucket: What it is padded to.
    """

    def __init__(
        self,
        layout: CacheLayout,
        stacks: Sequence[Sequence[Stack]],
        buffers: StepBuffers,
        bucket: StepShape,
    ) -> None:
        self._buffers = buffers
        self._rows: dict[str, _Rows] = {}
        self._read: Tensor | None = None
        written: dict[str, list[Tensor]] = {}
        for number, table in enumerate(layout.tables):
            unit = layout.pools[table.pool].unit
            if table.lifetime.rewritten:
                slots = buffers.block_tables[number, : bucket.num_requests, 0].long()
                written.setdefault(unit, []).append(slots)
            else:
                slots = buffers.slots[number, : bucket.num_tokens].clone()
                written.setdefault(unit, []).append(slots // table.block_size)
                if buffers.rows.num_drafts and self._read is None:
                    # Drafts beyond a request's last token have no place but the null block.
                    self._read = slots >= table.block_size
            for count, stack in enumerate(stacks[table.pool]):
                name = f"table {number}, caches {count}"
                rows, places = stack.tensor, slots
                if not table.lifetime.rewritten:
                    places = slots // (table.block_size // rows.shape[2])
                    rows = rows.flatten(1, 2)
                self._rows[name] = _Rows(stack.names, rows, places, table.lifetime.rewritten)
        self._written = {
            unit: each[0] if len(each) == 1 else torch.cat(each) for unit, each in written.items()
        }

    def read(self) -> Mapping[str, Tensor]:
        return {name: each.tensor[:, each.places] for name, each in self._rows.items()}

    def read_by_someone(self, key: str | None = None) -> Tensor | None:
        of_requests = key is not None and self._rows[key].of_requests
        return None if of_requests else self._read

    def write(self, values: Mapping[str, Tensor]) -> None:
        for name, each in self._rows.items():
            each.tensor[:, each.places] = values[name]

    @property
    def nbytes(self) -> int:
        return sum(
            len(each.names) * len(each.places) * each.tensor[0, 0].nbytes
            for each in self._rows.values()
        )

    def names(self, key: str) -> Sequence[str]:
        return self._rows[key].names

    def live(self, key: str, shape: StepShape) -> int:
        return shape.num_requests if self._rows[key].of_requests else shape.num_tokens

    def written(self) -> Units:
        return self._written

    def beside(self) -> Units:
        return self._near(reads=False)

    def near(self) -> Units:
        return self._near(reads=True)

    def _near(self, *, reads: bool) -> Units:
        blocks = self._buffers.known.blocks_near(reads=reads)
        return {unit: to_device(each, self._buffers.platform) for unit, each in blocks.items()}
