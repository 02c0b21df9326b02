"""The tensors that a model has from the start."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from reprise.addresses import address_of
from reprise.cache import LayerCache

_PLAIN = frozenset({
    bool, int, float, str, bytes, NoneType, FunctionType, torch.dtype, torch.device, torch.Size,
})  # fmt: skip
"""Types of what holds no tensor; modules have thousands of these."""
_MAYBE_EMPTY = frozenset({dict, OrderedDict, list, tuple, set})


def weights_of(model: nn.Module, others: Iterable[Tensor]) -> dict[str, Tensor]:
    """By name its parameters, buffers, and what its modules hold besides, such as tables: as
    attributes, in containers, dataclasses and modules that torch does not know of. A part of what
    is there already is left out.

    Args:
        model: Whose weights are looked for.
        others: Tensors that it holds and that are no weights.
    """
    found: dict[str, Tensor] = {}
    listed: list[tuple[int, int]] = []
    """Where the memory of each begins and ends, ascending."""
    left_out = [_extent(each) for each in others if each.numel()]
    modules = dict(model.named_modules())
    seen = {id(each): each for each in modules.values()}
    named = itertools.chain(
        model.named_parameters(),
        model.named_buffers(),
        *(_held(path, vars(module), seen) for path, module in modules.items()),
    )
    for name, tensor in named:
        if not tensor.numel():
            continue
        begin, end = _extent(tensor)
        before = bisect.bisect_right(listed, (begin, float("inf"))) - 1
        known = before >= 0 and end <= listed[before][1]
        if known or any(first <= begin and end <= last for first, last in left_out):
            continue
        if tensor.is_contiguous():
            bisect.insort(listed, (begin, end))
        found[name] = tensor.detach()
    return found


def _held(path: str, value: Any, seen: dict[int, Any]) -> Iterator[tuple[str, Tensor]]:
    """``seen``: by their identities the modules that are asked by themselves, and what was."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, LayerCache | type) or id(value) in seen:
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        items = enumerate(value)
    elif isinstance(value, nn.Module):
        items = vars(value).items()
    elif dataclasses.is_dataclass(value):
        fields = {each.name: getattr(value, each.name, None) for each in dataclasses.fields(value)}
        items = {**fields, **getattr(value, "__dict__", {})}.items()
    else:
        return
    seen[id(value)] = value
    for name, each in items:
        kind = type(each)
        if kind in _PLAIN or (kind in _MAYBE_EMPTY and not each):
            continue
        yield from _held(f"{path}.{name}" if path else f"{name}", each, seen)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Where the memory of a tensor begins and ends."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = address_of(tensor)
    return begin, begin + (last + 1) * tensor.itemsize
