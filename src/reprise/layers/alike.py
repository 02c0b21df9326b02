"""Layers that make the same op calls, of which a rehearsal runs few."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reprise.cache import LayerCache
from reprise.distributed import Group

_PLAIN = (int, float, complex, type(None), torch.dtype, torch.device, type)
_WIDE = 1 << 31
"""Bytes of memory from which a compiler may address it otherwise."""
_OF_ALL = frozenset(vars(nn.Module()))
"""What every module has for torch."""
_NUMBER = re.compile(r"(?<=[^\W\d]\.)\d+(?![^.])")
"""In a dotted name: the one of a layer. A text that is a number is another one than others."""


class Alike:
    """Finds out which layers are needed to make every call that all make.

    Args:
        layers: In the order in which they run, each on what the one before has left.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._held = [
            held
            for layer in layers
            for part in layer.modules()
            for held in (vars(part), part._forward_pre_hooks, part._forward_hooks)
        ]
        self._counts: list[int] = []
        """Of what they held when they were looked at: hooks may come later, and methods of one's
        own."""
        self._caches: list[list[LayerCache]] = []
        """Of each layer."""
        self._kinds: list[Hashable] = []
        """Of each layer, but for the memory of its caches: found when it is asked for first."""
        self._waits = False
        """The layers wait for other ranks, which have to run the same ones."""
        self._known: tuple[Hashable, list[int]] | None = None

    def some(self) -> list[int]:
        """The places of layers of every kind, behind those of every kind that they come behind:
        what a layer calls may depend on what the one before has put off. All, where they wait for
        other ranks."""
        counts = list(map(len, self._held))
        if counts != self._counts:
            self._counts, self._known, self._waits = counts, None, False
            self._kinds, self._caches = [], []
            for layer in self._layers:
                noted: list[LayerCache | Group] = []
                self._kinds.append(_described(layer, {}, noted))
                self._caches.append([each for each in noted if isinstance(each, LayerCache)])
                self._waits |= any(each.size > 1 for each in noted if isinstance(each, Group))
        if self._waits:
            return list(range(len(self._layers)))
        # Caches are made anew when their size is known. Who looks at torch's functions meanwhile
        # would be called for each of hundreds of numbers.
        with torch._C.DisableTorchFunction():
            now = tuple(
                tuple((each.table, *map(_place, each.tensors.values())) for each in caches)
                for caches in self._caches
            )
        if self._known is None or self._known[0] != now:
            self._known = now, chosen(list(zip(self._kinds, now, strict=True)))
        return self._known[1]


def chosen(kinds: Sequence[Hashable]) -> list[int]:
    """Of a sequence the places, ascending, of one pair of neighbours of each kind, and at the end
    one of the last kind: what comes behind may depend on it, too."""
    found: set[int] = set(range(min(1, len(kinds))))
    pairs: set[Hashable] = set()
    for second in range(1, len(kinds)):
        pair = kinds[second - 1], kinds[second]
        if pair not in pairs:
            pairs.add(pair)
            found |= {second - 1, second}
    if found and kinds[max(found)] != kinds[-1]:
        found.add(len(kinds) - 1)
    return sorted(found)


def _place(tensor: Tensor) -> Hashable:
    """All of a tensor that a kernel may be compiled for, and where it is to the next 16 bytes; of a
    number that the host could read without waiting also which."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return id(tensor)
    wide = tensor.untyped_storage().nbytes() >= _WIDE
    value = tensor.item() if tensor.is_cpu and tensor.numel() == 1 else None
    place = tensor.data_ptr() % 16
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride(), place, wide, value


def _described(value: Any, seen: dict[int, int], noted: list[LayerCache | Group]) -> Hashable:
    """What is equal of two objects only if they make the same calls. What is not known is equal to
    itself alone; dotted names may differ in numbers. Caches are noted, since their memory is left
    out, and groups of ranks."""
    if isinstance(value, _PLAIN) and not hasattr(value, "__dict__"):
        return type(value), value
    if type(value) is str:
        return _NUMBER.sub("", value)
    if id(value) in seen:
        return "again", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        return _place(value)
    if isinstance(value, LayerCache | Group):
        noted.append(value)
    items: list[tuple[Any, Any]]
    if type(value) is list or (isinstance(value, tuple) and not hasattr(value, "__dict__")):
        items = list(enumerate(value))
    elif type(value) is dict:
        items = list(value.items())
    elif any(vars(each).get("__slots__") for each in type(value).__mro__):
        return type(value), id(value)  # not all of it is in its dictionary
    elif isinstance(value, nn.Module):
        items = [(k, v) for k, v in vars(value).items() if k not in _OF_ALL or v]
    elif isinstance(value, LayerCache):
        items = [(k, v) for k, v in vars(value).items() if k not in ("table", "tensors")]
    elif dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
        items = list(vars(value).items())
    else:
        return type(value), id(value)
    return type(value), tuple([(key, _described(each, seen, noted)) for key, each in items])
