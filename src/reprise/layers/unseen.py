"""Modules between whose ops nothing looks at a number, so that the ops may be put off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from reprise.layers.formats import DENSE

Kind = TypeVar("Kind", bound=type[nn.Module])

_known: set[type[nn.Module]] = set()
_methods: list[tuple[Mapping[str, Any], str, Callable[..., Any]]] = []
"""Of the known classes, as they were defined: what a class has, a name and what it is there."""


def looks_at_nothing(kind: Kind) -> Kind:
    """Marks a class of modules which do nothing with tensors but call ops, make views and make new
    ones, where their weights are plain. Not its subclasses, which may do anything."""
    _known.add(kind)
    _methods.extend((vars(kind), name, each) for name, each in vars(kind).items() if callable(each))
    return kind


class Unseen:
    """Whether the forward passes of some modules only hand on what ops compute.

    Known of marked classes and of plain weights. Hooks may do anything, and so may what is put into
    a part's place, into its class's or into that of a method: it looks for all of them each time.

    Args:
        modules: Those, of which all parts count.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = [part for each in modules for part in each.modules()]
        names = {name for _, name, _ in _methods}
        self._known = all(
            type(each) in _known
            and getattr(each, "format", DENSE) is DENSE
            and names.isdisjoint(vars(each))
            for each in parts
        )
        self._parts = parts
        self._kinds = [type(each) for each in parts]
        self._hooks = [
            hooks for each in parts for hooks in (each._forward_hooks, each._forward_pre_hooks)
        ]
        self._places = [each._modules for each in parts]
        self._in_places = self._parts_of_parts()
        self._attributes = [vars(each) for each in parts]
        self._num_attributes = [len(each) for each in self._attributes]

    def _parts_of_parts(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(each.values() for each in self._places))

    def now(self) -> bool:
        """Whether the layers look at no number, as they are at the moment. A compiler is told no:
        it sees everything."""
        return (
            self._known
            and not torch.compiler.is_compiling()
            and not _has_any_global_hook()
            and not any(self._hooks)
            and list(map(type, self._parts)) == self._kinds
            and self._parts_of_parts() == self._in_places
            # One more attribute hides what the class has of that name.
            and list(map(len, self._attributes)) == self._num_attributes
            and all(of.get(name) is method for of, name, method in _methods)
        )
