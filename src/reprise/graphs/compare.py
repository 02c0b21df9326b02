"""Comparing what a replay computed with what eager execution computed, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_ONCE = 1 << 22
"""Elements that are compared at a time: memory is scarce once the caches have theirs."""


@dataclass(frozen=True)
class Difference:
    """One tensor that a replay got wrong."""

    tensor: str
    largest: float
    """Largest absolute difference; NaN where the replay left values unwritten."""
    wrong: int
    """Number of elements that differ."""
    elements: int

    def __str__(self) -> str:
        return (
            f"{self.tensor} differs in {self.wrong} of {self.elements} elements "
            f"(largest difference {self.largest:.3g})"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of equal shape and dtype hold the same bytes; NaN equals itself."""
    return torch.equal(_bytes(a), _bytes(b))


def differs(expected: Tensor, got: Tensor, bound: float | None = None) -> Tensor:
    """A boolean scalar on the device: whether two tensors of equal shape and dtype differ.

    Args:
        expected: What eager execution computed.
        got: What the replay computed.
        bound: None: compare bits. Else the allowed difference of an element, relative to the
            largest expected magnitude in its row (the last dimension).
    """
    flags = [_differ(one, other, bound) for one, other in _pieces(expected, got)]
    return torch.stack(flags).any()


def difference(
    name: str, expected: Tensor, got: Tensor, bound: float | None = None
) -> Difference | None:
    """How ``got`` differs from ``expected``; None: it does not. Arguments as of :func:`differs`."""
    if not bool(differs(expected, got, bound)):
        return None
    count, largest = 0, 0.0
    for one, other in _pieces(expected, got):
        if not expected.is_floating_point():
            gap = (one.long() - other.long()).abs().double()
            wrong = gap != 0
        else:
            gap = (one.double() - other.double()).abs()
            wrong = _wrong(one, other, bound or 0.0)
        if wrong.any():
            count += int(wrong.sum())
            found = float(gap[wrong].max())
            largest = found if math.isnan(found) or found > largest else largest
    # Equal values of different bits: zeros of either sign, or NaNs with different payloads.
    return Difference(name, largest, max(count, 1), expected.numel())


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference of an element, relative to the largest magnitude in its row; infinity
    where one side alone is no number."""
    return max(float(_relative(e, g)) for e, g in _pieces(expected, got))


def _differ(expected: Tensor, got: Tensor, bound: float | None) -> Tensor:
    if bound is None or not expected.is_floating_point():
        return (_bytes(expected) != _bytes(got)).any()
    return _wrong(expected, got, bound).any()


def _relative(expected: Tensor, got: Tensor) -> Tensor:
    wide, other = expected.double(), got.double()
    gap = (wide - other).abs() / _largest(wide).clamp(min=torch.finfo(torch.float64).tiny)
    gap = torch.where((wide == other) | (wide.isnan() & other.isnan()), 0.0, gap)
    return gap.nan_to_num(nan=float("inf")).max() if gap.numel() else gap.new_zeros(())


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both that hold whole rows (the last dimension) and, if rows allow, no more than
    :data:`_AT_ONCE` elements."""
    if a.numel() <= _AT_ONCE or a.dim() < 2:
        yield a, b
    elif len(a) == 1:
        yield from _pieces(a[0], b[0])
    else:
        half = len(a) // 2
        yield from _pieces(a[:half], b[:half])
        yield from _pieces(a[half:], b[half:])


def _wrong(expected: Tensor, got: Tensor, bound: float) -> Tensor:
    wide, other = expected.double(), got.double()
    close = (wide - other).abs() <= bound * _largest(wide)
    # A NaN on one side alone is wrong, which no comparison of a NaN says by itself.
    return ~(close | (wide.isnan() & other.isnan()) | (wide == other))


def _largest(wide: Tensor) -> Tensor:
    """Of each row, the largest finite magnitude."""
    if wide.dim() == 0:
        return wide.abs().nan_to_num(0.0, 0.0, 0.0)
    return wide.abs().nan_to_num(0.0, 0.0, 0.0).amax(dim=-1, keepdim=True)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in tensors.items()}


def poison(tensors: Iterable[Tensor]) -> None:
    """Fill with NaN; with -1 where there is none."""
    for each in tensors:
        each.fill_(float("nan") if each.is_floating_point() else -1)


def poison_memory(memory: Iterable[Tensor]) -> None:
    """Fill raw memory with ones, which every floating-point type reads as NaN."""
    for each in memory:
        each.fill_(0xFF)


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous()
    return flat.view(torch.uint8) if flat.dim() > 0 else flat.view(1).view(torch.uint8)
