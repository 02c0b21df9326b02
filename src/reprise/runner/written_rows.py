"""What a step writes in the caches, to be compared and put back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reprise.addresses import address_of
from reprise.cache.layout import CacheLayout
from reprise.cache.memory import PoolTensor
from reprise.cache.spec import LayerCache, Rows
from reprise.graphs.regions import Stack, Units
from reprise.runner.arena import to_device
from reprise.runner.step_inputs import StepInputs
from reprise.shape import StepShape

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Rows:
    """Rows of one table in tensors of equal layout."""

    names: Sequence[str]
    tensor: Tensor
    """[C, N, ...], a view of the caches; [C, N, B, ...] where rows of a block are no neighbours."""
    places: Sequence[Tensor]
    """[K] int64 each: those that the step writes."""

    of_requests: bool
    """A row is a request's, not a token's."""
    scales: tuple[str, Sequence[int]] | None
    """The key of their scales, and which caches there have them."""
    together: int
    """See :attr:`Rows.together`."""
    whole: Tensor | Literal[True] | None
    """Which caches have these rows written whole by the step, before it reads them: all, none, or
    [C, 1, ...] bool."""

    @property
    def written(self) -> tuple[slice | Tensor, ...]:
        """What the tensor is indexed with."""
        return slice(None), *self.places


@dataclass(frozen=True)
class _Found:
    rows: Mapping[str, _Rows]
    written: Units
    read: Tensor | None
    """[T] bool: which tokens' rows anybody reads; None: all."""


class WrittenRows:
    """The cache rows that the current inputs write, in every layer: each token's, or where a
    request's state is rewritten, each request's.

    Args:
        layout: Tables and pools.
        pools: Of each pool the tensors.
        stacks: Of each pool the same, [C, N, ...] each.
        buffers: Hold the step.
        bucket: What it is padded to.
        own: The caches that the step writes; others over the same tables it leaves alone.
    """

    def __init__(
        self,
        layout: CacheLayout,
        pools: Sequence[Mapping[str, PoolTensor]],
        stacks: Sequence[Sequence[Stack]],
        buffers: StepInputs,
        bucket: StepShape,
        own: Iterable[LayerCache],
    ) -> None:
        self._layout, self._pools, self._stacks = layout, pools, stacks
        self._buffers, self._bucket = buffers, bucket
        self._own = own

    @functools.cached_property
    def _found(self) -> _Found:
        """What the inputs said when this was asked for first: a caller that asks which units are
        near does not ask for it."""
        found_rows: dict[str, _Rows] = {}
        read: Tensor | None = None
        written: dict[str, list[Tensor]] = {}
        for number, table in enumerate(self._layout.tables):
            unit = self._layout.pools[table.pool].unit
            if table.lifetime.rewritten:
                slots = self._buffers.states(number, self._bucket.num_requests).long()
                written.setdefault(unit, []).append(slots)
            else:
                slots = self._buffers.slots[number, : self._bucket.num_tokens].clone()
                written.setdefault(unit, []).append(slots // table.block_size)
                if self._buffers.rows.num_drafts and read is None:
                    # Drafts beyond a request's last token have no place but the null block.
                    read = slots >= table.block_size
            keys = {
                name: f"table {number}, caches {count}"
                for count, stack in enumerate(self._stacks[table.pool])
                for name in stack.names
            }
            for stack in self._stacks[table.pool]:
                first = self._pools[table.pool][stack.names[0]]
                rows, places = stack.tensor, [slots]
                if first.rows.scales_of is not None:
                    rows = rows.movedim(-1, 2)
                    within = slots % table.block_size // first.rows.every
                    places = [slots // table.block_size, within]
                elif not table.lifetime.rewritten:
                    every = first.rows.every
                    places = [slots if every == 1 else slots // every]
                    rows = rows.flatten(1, 2)
                found_rows[keys[stack.names[0]]] = _Rows(
                    stack.names,
                    rows,
                    places,
                    table.lifetime.rewritten,
                    _scales(stack, self._pools[table.pool], self._stacks[table.pool], keys),
                    first.rows.together,
                    self._overwritten(number, stack, first.rows),
                )
        units = {
            unit: each[0] if len(each) == 1 else torch.cat(each) for unit, each in written.items()
        }
        return _Found(found_rows, units, read)

    @functools.cached_property
    def _places_of_own(self) -> set[tuple[int, int]]:
        """Tables, and where the tensors are that this step writes by them."""
        every = ((each.table, tensor) for each in self._own for tensor in each.tensors.values())
        return {(table, address_of(tensor)) for table, tensor in every}

    def _overwritten(self, table: int, stack: Stack, rows: Rows) -> Tensor | Literal[True] | None:
        """Of a stack the tensors that have a row written whole by each token of the step. A state
        goes on from what it was, and some tokens alone make a row that stands for several."""
        if rows.every > 1 or self._layout.tables[table].lifetime.rewritten:
            return None
        pool = self._pools[self._layout.tables[table].pool]
        own = [
            (table, address_of(pool[name].tensor)) in self._places_of_own for name in stack.names
        ]
        if all(own) or not any(own):
            return own[0] or None
        which = np.array(own).reshape(-1, *(1 for _ in stack.tensor.shape[2:]))
        return to_device(which, self._buffers.platform)

    @property
    def _rows(self) -> Mapping[str, _Rows]:
        return self._found.rows

    def read(self) -> Mapping[str, Tensor]:
        return {name: each.tensor[each.written] for name, each in self._rows.items()}

    def scales(self, key: str) -> tuple[str, Sequence[int]] | None:
        return self._rows[key].scales

    def together(self, key: str) -> int:
        return self._rows[key].together

    def read_by_someone(self, key: str | None = None) -> Tensor | None:
        of_requests = key is not None and self._rows[key].of_requests
        return None if of_requests else self._found.read

    def write(self, values: Mapping[str, Tensor]) -> None:
        for name, each in self._rows.items():
            each.tensor[each.written] = values[name]

    def spoil(self, values: Mapping[str, Tensor]) -> None:
        for name, each in self._rows.items():
            rows = values[name]
            if each.whole is not None:
                others = rows.view(_BITS[rows.itemsize]).bitwise_not().view(rows.dtype)
                rows = others if each.whole is True else torch.where(each.whole, others, rows)
            each.tensor[each.written] = rows

    @property
    def nbytes(self) -> int:
        return sum(
            len(each.names)
            * len(each.places[0])
            * each.tensor[(0,) * (1 + len(each.places))].nbytes
            for each in self._rows.values()
        )

    def names(self, key: str) -> Sequence[str]:
        return self._rows[key].names

    def live(self, key: str, shape: StepShape) -> int:
        return shape.num_requests if self._rows[key].of_requests else shape.num_tokens

    def kept(self) -> Sequence[Tensor]:
        places = {id(place): place for each in self._rows.values() for place in each.places}
        read = self._found.read
        return [*places.values(), *([] if read is None else [read])]

    def written(self) -> Units:
        return self._found.written

    def beside(self) -> Units:
        return self._near(reads=False)

    def near(self) -> Units:
        return self._near(reads=True)

    def _near(self, *, reads: bool) -> Units:
        blocks = self._buffers.known.blocks_near(reads=reads)
        return {unit: to_device(each, self._buffers.platform) for unit, each in blocks.items()}


def _scales(
    codes: Stack, pool: Mapping[str, PoolTensor], stacks: Sequence[Stack], keys: Mapping[str, str]
) -> tuple[str, Sequence[int]] | None:
    """See :meth:`reprise.graphs.contract.State.scales`."""
    names = [each for each in (pool[name].scales for name in codes.names) if each is not None]
    if not names:
        return None
    stack = next(each for each in stacks if names[0] in each.names)
    return keys[names[0]], [stack.names.index(each) for each in names]
