"""What a step updates in place, as it is kept, put back and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from reprise.graphs.compare import Coded, Compared, Difference, copies, difference, part
from reprise.graphs.contract import Computation, State
from reprise.ops.registry import OpTable
from reprise.shape import StepShape


def memory_of_ops(table: OpTable) -> dict[str, Tensor]:
    """What the implementations in use keep from call to call, by name.

    A graph that leaves it in disorder spoils the steps after it, eager ones too: so it is compared
    like any result, and put back.
    """
    return {f"memory of ops ({key})": tensor for key, tensor in table.memory.items()}


Values = dict[str, Tensor]


class StepMemory:
    """What the step in the static inputs updates: rows of the caches, and the memory of ops."""

    def __init__(self, computation: Computation, bucket: StepShape, live: StepShape) -> None:
        self._computation = computation
        self._state: State = computation.state(bucket)
        self._live = live
        self._ops = memory_of_ops(computation.ops)
        self.written = self._state.written()
        self.outputs = computation.outputs(live)

    def state(self) -> Values:
        """Copies of all of it."""
        return {**self._state.read(), **copies(self._ops)}

    def put(self, values: Values, *, spoilt: bool = False) -> None:
        """Put back what :meth:`state` returned.

        Args:
            values: It.
            spoilt: But for what the step overwrites: see :meth:`State.spoil`.
        """
        rows = {k: v for k, v in values.items() if k not in self._ops}
        if spoilt:
            self._state.spoil(rows)
        else:
            self._state.write(rows)
        for name, tensor in self._ops.items():
            tensor.copy_(values[name])

    def kept(self) -> Sequence[Tensor]:
        """See :meth:`State.kept`."""
        return self._state.kept()

    def clear_unread(self) -> None:
        """Make outputs that are not read the same, however they were computed."""
        read = self._state.read_by_someone()
        if read is not None:
            for each in self.outputs.values():
                each.masked_fill_(~read[: len(each)].unsqueeze(1), 0)

    def meet_new_memory(self, earlier: Values) -> None:
        """Ops that ran for the first time have made memory: it was then what it is now."""
        for name, tensor in memory_of_ops(self._computation.ops).items():
            if name not in self._ops:
                self._ops[name], earlier[name] = tensor, tensor.clone()

    def pairs(
        self, expected: Values, got: Values, bound: float | None
    ) -> Iterator[tuple[Compared, Compared]]:
        """What has to be the same, tensor for tensor."""
        found, other = self._compared(expected, bound), self._compared(got, bound)
        return ((each, other[name]) for name, each in found.items())

    def told(self, expected: Values, got: Values, bound: float | None) -> list[Difference | None]:
        """What differs, tensor for tensor and cache for cache."""
        found: list[Difference | None] = []
        other = self._compared(got, bound)
        for key, each in self._compared(expected, bound).items():
            if key in self._ops:
                found.append(difference(key, each, other[key], bound))
                continue
            for number, name in enumerate(self._state.names(key)):
                pair = part(each, number), part(other[key], number)
                found.append(difference(name, *pair, bound))
        return found

    def _compared(self, values: Values, bound: float | None) -> dict[str, Compared]:
        """Of what :meth:`state` returned, what counts; caches without the rows of padding."""
        caches = {
            name: self._read(name, each) for name, each in values.items() if name not in self._ops
        }
        found = caches if bound is None else coded(self._state, caches)
        return {**found, **{name: values[name] for name in self._ops}}

    def _read(self, name: str, rows: Tensor) -> Tensor:
        """Of rows of the caches those that are not padding's; zeros where they are not read."""
        count = self._state.live(name, self._live)
        rows, read = rows[:, :count], self._state.read_by_someone(name)
        if read is None:
            return rows
        read = read[:count].view(1, -1, *(1 for _ in rows.shape[2:]))
        return torch.where(read, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))


def coded(state: State, values: Mapping[str, Tensor]) -> dict[str, Compared]:
    """Rows of the caches as bounds are meant for them: codes and their scales as one, numbers of
    one scale as one row. ``values``: as ``state`` read them."""
    found: dict[str, Compared] = {
        name: each.flatten(-state.together(name)) for name, each in values.items()
    }
    of_codes: set[str] = set()
    for name, codes in values.items():
        scales = state.scales(name)
        if scales is not None:
            key, which = scales
            found[name] = Coded(codes, values[key][which])
            of_codes.add(key)
    return {name: each for name, each in found.items() if name not in of_codes}
