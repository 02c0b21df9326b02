"""Comparing what a replay computed with what eager execution computed, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 22
"""Elements that are compared at a time: memory is scarce once the caches have theirs."""
SMALL = 1 << 20
"""Bytes. Tensors up to this are put into one before they are looked at: a call for each costs the
host more than the copy costs the device."""


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


class Coded(NamedTuple):
    """Rows of eight-bit numbers, to be compared as what they stand for. A row that was rounded once
    more elsewhere may have fallen on the other side of the middle between two codes, so each may be
    the next one."""

    codes: Tensor
    """[..., D]."""
    scales: Tensor
    """[...], what those of each row are multiplied by."""


Compared = Tensor | Coded


def differs(expected: Compared, got: Compared, bound: float | None = None) -> Tensor:
    """A boolean scalar on the device: whether two tensors of equal shape and dtype differ.

    Args:
        expected: What eager execution computed.
        got: What the replay computed.
        bound: None: compare bits. Else the allowed difference of an element, relative to the
            largest expected magnitude in its row (the last dimension); what underflow does to a
            number is allowed in any case.
    """
    flags = _flags(expected, got, bound)
    return flags[0] if len(flags) == 1 else torch.stack(flags).any()


def differ(pairs: Iterable[tuple[Compared, Compared]], bound: float | None = None) -> list[Tensor]:
    """Boolean scalars on the device, of which one is true if a pair differs, in few launches: what
    :func:`differs` says of each. Pairs are on one device."""
    flags: list[Tensor] = []
    small: list[tuple[Tensor, Tensor]] = []
    for expected, got in pairs:
        if _by_bits(expected, bound) and _values(expected).nbytes <= SMALL:
            small.append((_bytes(_values(expected)), _bytes(_values(got))))
        else:
            flags += _flags(expected, got, bound)
    if small:
        one, other = (torch.cat(each) for each in zip(*small, strict=True))
        flags.append((one != other).any())
    return flags


def difference(
    name: str, expected: Compared, got: Compared, bound: float | None = None
) -> Difference | None:
    """How ``got`` differs from ``expected``; None: it does not. Arguments as of :func:`differs`."""
    if not bool(differs(expected, got, bound)):
        return None
    count, largest = 0, 0.0
    for one, other in _pieces(expected, got):
        if isinstance(one, Tensor) and not one.is_floating_point():
            assert isinstance(other, Tensor)
            gap = (one.long() - other.long()).abs().double()
            wrong = gap != 0
        else:
            gap = (_numbers(one) - _numbers(other)).abs()
            wrong = _wrong(one, other, bound)
        if wrong.any():
            count += int(wrong.sum())
            found = float(gap[wrong].max())
            largest = found if math.isnan(found) or found > largest else largest
    # Equal values of different bits: zeros of either sign, or NaNs with different payloads.
    return Difference(name, largest, max(count, 1), _values(expected).numel())


def relative_difference(expected: Compared, got: Compared) -> float:
    """The largest difference of an element, relative to the largest magnitude in its row; infinity
    where one side alone is no number."""
    return max(float(_relative(e, g)) for e, g in _pieces(expected, got))


def _flags(expected: Compared, got: Compared, bound: float | None) -> list[Tensor]:
    """See :func:`differs`, piece by piece."""
    if not _by_bits(expected, bound):
        return [_wrong(*each, bound).any() for each in _pieces(expected, got)]
    one, other = _values(expected), _values(got)
    if one.is_contiguous() and other.is_contiguous():
        words = (each.split(_AT_ONCE) for each in _words(one, other))
        return [(a != b).any() for a, b in zip(*words, strict=True)]
    return [(_bytes(_values(a)) != _bytes(_values(b))).any() for a, b in _pieces(expected, got)]


def _by_bits(expected: Compared, bound: float | None) -> bool:
    return isinstance(expected, Tensor) and (bound is None or not expected.is_floating_point())


def _relative(expected: Compared, got: Compared) -> Tensor:
    wide, other = _numbers(expected), _numbers(got)
    gap = ((wide - other).abs() - _slack(expected)).clamp(min=0)
    gap = gap / _largest(wide).clamp(min=torch.finfo(torch.float64).tiny)
    gap = torch.where((wide == other) | (wide.isnan() & other.isnan()), 0.0, gap)
    return gap.nan_to_num(nan=float("inf")).max() if gap.numel() else gap.new_zeros(())


def _pieces(a: Compared, b: Compared) -> Iterator[tuple[Compared, Compared]]:
    """Views of both that hold whole rows (the last dimension) and, if rows allow, no more than
    :data:`_AT_ONCE` elements."""
    values = _values(a)
    if values.numel() <= _AT_ONCE or values.dim() < 2:
        yield a, b
    elif len(values) == 1:
        yield from _pieces(part(a, 0), part(b, 0))
    else:
        half = len(values) // 2
        yield from _pieces(part(a, slice(half)), part(b, slice(half)))
        yield from _pieces(part(a, slice(half, None)), part(b, slice(half, None)))


def _values(x: Compared) -> Tensor:
    return x if isinstance(x, Tensor) else x.codes


def part(x: Compared, index: int | slice) -> Compared:
    """A part of it, by the first dimension."""
    return x[index] if isinstance(x, Tensor) else Coded(x.codes[index], x.scales[index])


def _numbers(x: Compared) -> Tensor:
    if isinstance(x, Tensor):
        return x.double()
    return x.codes.double() * x.scales.double().unsqueeze(-1)


def _slack(expected: Compared) -> Tensor | float:
    """How far from an element the next code is; of numbers, what underflow may do to one: it is
    rounded to a multiple of the smallest, or flushed, as float32 is in which they are computed."""
    if isinstance(expected, Tensor):
        own = torch.finfo(expected.dtype)
        return max(own.smallest_normal * own.eps, torch.finfo(torch.float32).smallest_normal)
    of = torch.finfo(expected.codes.dtype)
    magnitude = expected.codes.double().abs().clamp(min=of.smallest_normal)
    power = torch.ldexp(torch.ones_like(magnitude), magnitude.frexp().exponent - 1)
    return power * of.eps * expected.scales.double().unsqueeze(-1)


def _wrong(expected: Compared, got: Compared, bound: float | None) -> Tensor:
    wide, other = _numbers(expected), _numbers(got)
    allowed = 0.0 if bound is None else bound * _largest(wide) + _slack(expected)
    close = (wide - other).abs() <= allowed
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
    """Fill with NaN; where there is none with -2, which is no result: -1 says that there is no
    draft."""
    for each in tensors:
        each.fill_(float("nan") if each.is_floating_point() else -2)


def poison_memory(memory: Iterable[Tensor]) -> None:
    """Fill raw memory with ones, which every floating-point type reads as NaN."""
    for each in memory:
        each.fill_(0xFF)


def _words(*tensors: Tensor) -> list[Tensor]:
    """The bytes of contiguous tensors; eight of them are one number, if their places allow it."""
    found = [_bytes(each) for each in tensors]
    places = (place for each in found for place in (len(each), each.storage_offset()))
    return found if any(each % 8 for each in places) else [e.view(torch.int64) for e in found]


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous()
    # Where a dimension has one element torch calls any stride of it contiguous.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
