"""The tensors that a model has from the start."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from reprise.addresses import address_of
from reprise.cache import LayerCache


def weights_of(model: nn.Module, others: Iterable[Tensor] = ()) -> dict[str, Tensor]:
    """By name its parameters, buffers, and what its modules hold besides, such as tables: as
    attributes, in lists, tuples, dictionaries and dataclasses. A part of what is there already is
    left out.

    Args:
        model: It.
        others: Tensors that it holds and that are no weights.
    """
    found: dict[str, Tensor] = {}
    listed: list[tuple[int, int]] = []
    """Where the memory of each begins and ends, ascending."""
    left_out = [_extent(each) for each in others if each.numel()]
    named = itertools.chain(
        model.named_parameters(),
        model.named_buffers(),
        *(_held(path, vars(module), set()) for path, module in model.named_modules()),
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


def _held(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
        items = vars(value).items()
    if isinstance(value, LayerCache | nn.Module | type) or id(value) in seen:
        return
    seen.add(id(value))
    for name, each in items:
        yield from _held(f"{path}.{name}" if path else f"{name}", each, seen)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Where its memory begins and ends."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = address_of(tensor)
    return begin, begin + (last + 1) * tensor.itemsize
