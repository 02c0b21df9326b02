"""The memory that a step reads or writes, or that lies beside it: one list for all uses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Owner = Literal["input", "cache", "ops", "weight", "beside"]
"""Whose memory it is, which decides what a step may do to it and how it is made good.

``input``: static inputs; a step changes nothing there, a copy makes it good.
``cache``: what steps leave for later ones; a step writes its own rows (:class:`State`), requests
    that own a changed unit must be computed again.
``ops``: what ops keep from call to call; a step leaves what eager execution leaves there.
``weight``: what the model was loaded with; nothing may change it, it is loaded again.
``beside``: memory of others, such as the sampler's; a step changes nothing there, a copy makes it
    good.
"""


@dataclass(frozen=True)
class Region:
    """One tensor in the list of memory."""

    tensor: Tensor
    owner: Owner
    unit: str | None = None
    """What an entry of its first dimension is, such as ``block``: entries of the same number in
    tensors of the same unit belong together. None: the tensor is one thing."""
    used: int | None = None
    """So many units have been used; what others hold is not read. None: all."""


Units = Mapping[str, Tensor]
"""Numbers of units, [K] int64, by what they are: :attr:`Region.unit`."""


@dataclass(frozen=True)
class Stack:
    """Tensors of equal layout at equal distances, such as the caches of all layers: as one."""

    names: tuple[str, ...]
    tensor: Tensor
    """[R, ...], a view of all of them."""


def stacked(tensors: Mapping[str, Tensor]) -> list[Stack]:
    """The tensors in as few stacks as can be, so that what is done to all takes few launches."""
    stacks: list[Stack] = []
    names: list[str] = []
    distance = 0

    def close() -> None:
        if not names:
            return
        first = tensors[names[0]]
        shape = (len(names), *first.shape)
        strides = (distance, *first.stride())
        view = torch.as_strided(first, shape, strides, first.storage_offset())
        stacks.append(Stack(tuple(names), view))

    # A layer may have several tensors, side by side with those of the next one.
    kinds: dict[object, list[str]] = {}
    for name, each in tensors.items():
        kinds.setdefault((each.dtype, each.shape, each.stride()), []).append(name)
    for name in itertools.chain(*kinds.values()):
        each = tensors[name]
        if names:
            gap = _distance(tensors[names[-1]], each)
            if gap is not None and (len(names) == 1 or gap == distance):
                distance = gap
                names.append(name)
                continue
            close()
        names, distance = [name], 0
    close()
    return stacks


def _distance(first: Tensor, second: Tensor) -> int | None:
    """Elements between two tensors that are alike and lie in one storage; None: they do not."""
    alike = (
        first.shape == second.shape
        and first.dtype == second.dtype
        and first.stride() == second.stride()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    )
    gap = int(second.storage_offset() - first.storage_offset())
    return gap if alike and gap > 0 else None


@dataclass(frozen=True)
class Span:
    """Tensors that lie close together in one storage, such as the arrays of an arena: as bytes."""

    tensors: Mapping[str, Tensor]
    bytes: Tensor
    """[B] uint8, all of them and what lies between."""


def spans(tensors: Mapping[str, Tensor]) -> list[Span]:
    """The tensors in as few spans as can be without much between them that is not theirs."""
    storages: dict[int, dict[str, Tensor]] = {}
    for name, each in tensors.items():
        storages.setdefault(each.untyped_storage().data_ptr(), {})[name] = each
    found: list[Span] = []
    for group in storages.values():
        begin = min(_begin(each) for each in group.values())
        end = max(_begin(each) + each.nbytes for each in group.values())
        if all(each.is_contiguous() for each in group.values()) and (
            end - begin <= 2 * sum(each.nbytes for each in group.values())
        ):
            first = next(iter(group.values()))
            flat = torch.empty(0, dtype=torch.uint8, device=first.device)
            flat.set_(first.untyped_storage(), begin, (end - begin,), (1,))
            found.append(Span(group, flat))
        else:
            found += [Span({name: each}, each) for name, each in group.items()]
    return found


def _begin(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.itemsize


def as_words(units: Tensor) -> Tensor:
    """[R, N, W] int32 over the bytes of ``units`` [R, N, X], whose last dimension is contiguous.

    A view wherever the memory allows it; else each byte becomes a word.
    """
    places = (units.storage_offset(), units.shape[2], *units.stride()[:2])
    if all(each * units.itemsize % 4 == 0 for each in places):
        return units.view(torch.int32)
    return units.contiguous().view(torch.uint8).to(torch.int32)


def owned(memory: Mapping[str, Region], *owners: Owner) -> dict[str, Tensor]:
    """The tensors of some owners."""
    return {name: each.tensor for name, each in memory.items() if each.owner in owners}
