"""Whether a step changed memory that it may not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reprise import ops
from reprise.graphs.compare import Compared, differ, differs
from reprise.graphs.contract import Computation
from reprise.graphs.regions import (
    Owner,
    Region,
    Span,
    Stack,
    Units,
    as_words,
    owned,
    spans,
    stacked,
)
from reprise.graphs.seal import sum_of

PARTS = 16
"""A background canary checks the memory that its step has nothing to do with in so many parts, one
after the other."""
SUMMED: frozenset[Owner] = frozenset({"cache", "weight"})
"""Whose memory is too large to be copied: that it was changed shows, and cannot be put back."""


@dataclass(frozen=True)
class Change:
    """A piece of memory that changed although nothing may have changed it."""

    name: str
    owner: Owner
    unit: str | None = None
    index: int | None = None
    """Which unit; None: the tensor as a whole."""
    before: bool = False
    """The memory had changed already when the step began."""

    def __str__(self) -> str:
        where = "" if self.index is None else f", {self.unit} {self.index}"
        when = " (changed before the step)" if self.before else ""
        return f"{self.name}{where}{when}"


@dataclass(frozen=True)
class Scope:
    """What to look at besides inputs, memory of ops and what lies beside: those are small."""

    units: Units | None = None
    """Of the caches; None: all."""
    part: int | None = None
    """Which of :data:`PARTS` of the weights; None: all of them; negative: none."""


@dataclass
class Before:
    """The memory before a step, as copies and sums; and, once checked, the sums behind it."""

    scope: Scope
    memory: Mapping[str, Region]
    copied: list[tuple[Span, Tensor]]
    caches: list[tuple[Stack, Tensor]]
    weights: dict[str, Tensor] = field(default_factory=dict)
    caches_after: list[tuple[Stack, Tensor]] = field(default_factory=list)
    weights_after: dict[str, Tensor] = field(default_factory=dict)

    def kept(self) -> list[Tensor]:
        """What was taken down before the step."""
        copied = [kept for _, kept in self.copied]
        return [*copied, *(sums for _, sums in self.caches), *self.weights.values()]


class Guard:
    """Compares the memory of a computation before and after a step.

    Inputs and what lies beside are copied. Caches and weights are too large for that: a sum over
    each unit is compared instead (``ops.checksum``).

    Args:
        computation: Lists its memory.
    """

    def __init__(self, computation: Computation) -> None:
        self._computation = computation
        self._at_rest: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        """Sums of the weights as they were loaded."""
        self._sums: Sequence[Tensor] = ()
        """The same, where no graph can write."""
        self._stacked: tuple[list[int], list[Stack]] | None = None
        self._spans: tuple[dict[str, tuple[int, int]], list[Span]] | None = None
        """Of each tensor, which the spans hold on to, the object and its place; and the spans."""
        self._carried: list[tuple[Stack, Tensor]] | None = None
        """Sums of all caches behind the step that was checked last; None: others ran since."""

    @property
    def knows_weights(self) -> bool:
        """What they were when they were right."""
        return bool(self._weights)

    def learn_weights(self) -> None:
        """The weights are right as they are now."""
        self._weights = {
            name: sum_of(each) for name, each in owned(self._computation.memory(), "weight").items()
        }
        sums = list(self._weights.values())
        self._sums = torch.cat(sums).cpu().split(1) if sums else ()

    @property
    def zeros(self) -> set[str]:
        """Weights that were zeros when they were taken down: so is what is multiplied by them."""
        return {
            name for name, each in zip(self._weights, self._sums, strict=True) if not each.any()
        }

    def example(self) -> None:
        """Call what checks call, on the null units: it is compiled with the other kernels then."""
        memory = self._computation.memory()
        for stack in self._stacks(memory):
            _unit_sums(memory, stack, torch.zeros(2, dtype=torch.int64, device=stack.tensor.device))
        for weight in list(owned(memory, "weight").values())[:1]:
            sum_of(weight)

    def learn_ops(self) -> None:
        """Ops are between two steps, and what they keep is as they leave it. What they have made
        since the last call is taken down: where no graph can write."""
        table = self._computation.ops
        for name, tensor in table.memory.items():
            if name not in table.counters and name not in self._at_rest:
                self._at_rest[name] = tensor.to("cpu", copy=True)

    def settle_ops(self) -> None:
        """Bring what ops keep into the order that they leave it in: a replay broke off."""
        for name, tensor in self._computation.ops.memory.items():
            if name in self._at_rest:
                tensor.copy_(self._at_rest[name])

    def part(self, near: Units, turn: int) -> Scope:
        """``near`` and a :data:`PARTS`-th of all other units and of the weights."""
        memory = self._computation.memory()
        part = turn % PARTS
        counts: dict[str, int] = {}
        for name in owned(memory, "cache"):
            unit = memory[name].unit or ""
            counts[unit] = max(counts.get(unit, 0), _used(memory, name))
        units = {}
        for unit, count in counts.items():
            rest = torch.arange(min(part, count), count, PARTS, device=near[unit].device)
            units[unit] = torch.cat((near[unit], rest))
        return Scope(units, part)

    def forget(self) -> None:
        """A step runs that is not checked."""
        self._carried = None

    def before(self, scope: Scope) -> Before:
        """Take down the memory that a step must leave alone."""
        memory = self._computation.memory()
        kept = [(each, each.bytes.clone()) for each in self._copied(memory)]
        stacks = self._stacks(memory)
        if scope.units is None and self._carries(memory, stacks):
            assert self._carried is not None
            sums = self._carried
        else:
            sums = [(each, _unit_sums(memory, each, _of(memory, each, scope))) for each in stacks]
        before = Before(scope, memory, kept, sums)
        # Where everything is checked at every step, the step before has looked.
        if scope.units is not None or scope.part is not None:
            before.weights = self._weight_sums(memory, scope)
        self._carried = None
        return before

    def flags(self, before: Before) -> list[Tensor]:
        """Boolean scalars on the device, of which one is true if something has changed. The rows
        that the step may write must have been put back."""
        return differ(self.pairs(before))

    def pairs(self, before: Before) -> list[tuple[Compared, Compared]]:
        """What has to be the same for that."""
        memory = before.memory
        before.caches_after = [
            (stack, _unit_sums(memory, stack, _of(memory, stack, before.scope)))
            for stack, _ in before.caches
        ]
        before.weights_after = self._weight_sums(memory, before.scope)
        pairs: list[tuple[Compared, Compared]] = [
            (kept, span.bytes) for span, kept in before.copied
        ]
        for (_, now), (_, then) in zip(before.caches_after, before.caches, strict=True):
            pairs.append((then, now))
        for sums in (before.weights, before.weights_after):
            pairs += [(self._weights[name], each) for name, each in sums.items()]
        return pairs

    def changes(self, before: Before) -> list[Change]:
        """What :meth:`flags` found, in detail."""
        memory = before.memory
        found: list[Change] = []
        for span, kept in before.copied:
            for name, tensor in span.tensors.items():
                if bool(differs(_part(span, kept, tensor), tensor)):
                    found.append(Change(name, memory[name].owner))
        for (stack, now), (_, then) in zip(before.caches_after, before.caches, strict=True):
            for region, position in (now != then).nonzero().tolist():
                name, units = stack.names[region], _of(memory, stack, before.scope)
                index = position if units is None else int(units[position])
                found.append(Change(name, "cache", memory[name].unit, index))
        changed_before = [
            name for name, each in before.weights.items() if not self._is_right(name, each)
        ]
        for name, each in before.weights_after.items():
            if not self._is_right(name, each):
                found.append(Change(name, "weight", before=name in changed_before))
        return found

    def put_back(self, before: Before) -> None:
        """Give inputs and what lies beside the content that they had."""
        for span, kept in before.copied:
            span.bytes.copy_(kept)

    def carry(self, before: Before, written: Units | None) -> None:
        """Use the sums behind this step as those before the next one.

        Args:
            before: Of this step, whose check found nothing.
            written: Units that have been written since the check.
        """
        if before.scope.units is not None:
            return
        memory = before.memory
        for stack, sums in before.caches_after:
            if written is not None:
                units = written[memory[stack.names[0]].unit or ""]
                sums[:, units] = _unit_sums(memory, stack, units)
        self._carried = before.caches_after

    def wrong_weights(self) -> list[str]:
        """Weights that are not what they were when they were loaded."""
        memory = self._computation.memory()
        sums = self._weight_sums(memory, Scope())
        found = differ((self._weights[name], each) for name, each in sums.items())
        if not any(map(bool, found)):
            return []  # the device was asked once
        for known, each in zip(self._weights.values(), self._sums, strict=True):
            known.copy_(each)  # they may have been changed themselves
        return [name for name, each in sums.items() if not self._is_right(name, each)]

    def _copied(self, memory: Mapping[str, Region]) -> list[Span]:
        """What is copied; spans are found again only when there are other tensors, or one of them
        lies elsewhere."""
        tensors = owned(memory, "input", "beside")
        places = {name: (id(each), each.data_ptr()) for name, each in tensors.items()}
        if self._spans is None or self._spans[0] != places:
            self._spans = places, spans(tensors)
        return self._spans[1]

    def _stacks(self, memory: Mapping[str, Region]) -> list[Stack]:
        """The caches; they are stacked again only when there are others."""
        caches = owned(memory, "cache")
        places = [each.data_ptr() for each in caches.values()]
        if self._stacked is None or self._stacked[0] != places:
            kinds = dict.fromkeys(memory[name].unit for name in caches)
            groups = [{k: v for k, v in caches.items() if memory[k].unit == kind} for kind in kinds]
            self._stacked = places, [stack for group in groups for stack in stacked(group)]
        return self._stacked[1]

    def _carries(self, memory: Mapping[str, Region], stacks: list[Stack]) -> bool:
        """Whether the carried sums are those of the caches as they are in use now."""
        return (
            self._carried is not None
            and len(self._carried) == len(stacks)
            and all(
                then.tensor.data_ptr() == now.tensor.data_ptr()
                and sums.shape == (len(now.names), _used(memory, now.names[0]))
                for (then, sums), now in zip(self._carried, stacks, strict=True)
            )
        )

    def _is_right(self, name: str, sums: Tensor) -> bool:
        return torch.equal(sums, self._weights[name])

    def _weight_sums(self, memory: Mapping[str, Region], scope: Scope) -> dict[str, Tensor]:
        part = scope.part
        if part is not None and part < 0:
            return {}
        return {
            name: sum_of(memory[name].tensor)
            for number, name in enumerate(self._weights)
            if part is None or number % PARTS == part
        }


def _part(span: Span, kept: Tensor, tensor: Tensor) -> Tensor:
    """What a copy of the span has of one of its tensors."""
    if kept.dtype == tensor.dtype and kept.shape == tensor.shape:
        return kept
    begin = tensor.data_ptr() - span.bytes.data_ptr()
    own = kept[begin : begin + tensor.nbytes].clone()  # its address suits any dtype
    return own.view(tensor.dtype).view(tensor.shape)


def _unit_sums(memory: Mapping[str, Region], stack: Stack, units: Tensor | None) -> Tensor:
    """[R, K] int64: of each tensor of the stack, the sums of some units or of all used ones."""
    words = as_words(stack.tensor.flatten(2))
    return ops.checksum(
        words[:, : _used(memory, stack.names[0])] if units is None else words, units
    )


def _of(memory: Mapping[str, Region], stack: Stack, scope: Scope) -> Tensor | None:
    """Which units of the stack's tensors a scope has; None: all."""
    return None if scope.units is None else scope.units[memory[stack.names[0]].unit or ""]


def _used(memory: Mapping[str, Region], name: str) -> int:
    region = memory[name]
    return len(region.tensor) if region.used is None else region.used
