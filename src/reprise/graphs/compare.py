"""Comparing what a replay computed with what eager execution computed, bit by bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE_ULPS = 32
"""Allowed difference where an op is declared nondeterministic: this many epsilons of the dtype,
relative to the largest expected magnitude of the tensor."""


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


def difference(name: str, expected: Tensor, got: Tensor, *, exact: bool) -> Difference | None:
    """How ``got`` differs from ``expected``; None: it does not.

    Args:
        name: Of the tensor, for the report.
        expected: What eager execution computed.
        got: What the replay computed, same shape and dtype.
        exact: Compare bits; else allow the tolerance of nondeterministic ops.
    """
    if same_bits(expected, got):
        return None
    if not expected.is_floating_point():
        gap = (expected.long() - got.long()).abs()
        wrong = gap != 0
    else:
        wide, other = expected.double(), got.double()
        gap = (wide - other).abs()
        allowed = 0.0
        if not exact:
            largest = wide.abs().nan_to_num(0.0, 0.0, 0.0).amax().item()
            allowed = TOLERANCE_ULPS * torch.finfo(expected.dtype).eps * float(largest)
        # A NaN on one side alone is wrong, which no comparison of a NaN says by itself.
        wrong = ~((gap <= allowed) | (wide.isnan() & other.isnan()) | (wide == other))
    count = int(wrong.sum())
    if count == 0 and (not exact or not expected.is_floating_point()):
        return None
    # Equal values of different bits: zeros of either sign, or NaNs with different payloads.
    count = max(count, 1)
    return Difference(name, float(gap.double()[wrong].max()) if wrong.any() else 0.0,
                      count, expected.numel())  # fmt: skip


def first_difference(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], *, exact: bool
) -> Difference | None:
    """The first tensor, in the order of ``expected``, that differs."""
    for name, tensor in expected.items():
        found = difference(name, tensor, got[name], exact=exact)
        if found is not None:
            return found
    return None


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
