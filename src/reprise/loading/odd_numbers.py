"""Weights that are NaN or infinite: with them a model gives any text, and says nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from reprise.errors import LoadError
from reprise.finite import all_finite, first_odd
from reprise.loading.transfer import STAGING_BYTES, WORKERS, Copy

MOST = 8
"""Tensors that an error names."""


def find_odd(copies: Sequence[Copy]) -> list[Copy]:
    """The copies whose numbers would not be finite at their targets, which are not written to. What
    is on a device is looked at there."""
    with ThreadPoolExecutor(WORKERS, "reprise-weights") as pool:
        found = list(pool.map(_is_finite, copies))
    return [each for each, finite in zip(copies, found, strict=True) if not finite]


def refuse_odd(copies: Sequence[Copy], remedy: str) -> None:
    """Raise if there are any.

    Args:
        copies: With numbers that are not finite.
        remedy: Said at the end.

    Raises:
        LoadError: Their names, and the first such number of each.
    """
    if copies:
        found = "; ".join(_describe(each) for each in copies[:MOST])
        more = f"; and {len(copies) - MOST} more tensors" if copies[MOST:] else ""
        raise LoadError(f"weights that are not finite: {found}{more}; {remedy}")


def _is_finite(copy: Copy) -> bool:
    # The mode is a thread's own.
    with torch.inference_mode():
        for each in _numbers(copy):
            finite = all_finite(each) if each.device.type == "cpu" else _finite_on_device(each)
            if not finite:
                return False
    return True


def _numbers(copy: Copy) -> Iterator[Tensor]:
    """What the target would get, a piece at a time."""
    for each in copy.converted().pieces(STAGING_BYTES):
        yield each.source.to(each.target.dtype)


def _finite_on_device(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(wide.isfinite().all())


def _describe(copy: Copy) -> str:
    """What is not finite, and where it is in the tensor that is stored."""
    source = copy.source.detach().cpu()
    place = first_odd(source)
    if place is not None:
        return f"{copy.name}: {source[place].item()} at {_index(copy, place)}"
    made = copy.converted().source.to(copy.target.dtype).cpu()
    place = first_odd(made)
    dtype = str(copy.target.dtype).removeprefix("torch.")
    if place is None or made.shape != source.shape:
        return f"{copy.name}, as it is computed in {dtype}"
    return (
        f"{copy.name}: {source[place].item():g} at {_index(copy, place)} is beyond {dtype} "
        "(another dtype= reaches further)"
    )


def _index(copy: Copy, place: Sequence[int]) -> list[int]:
    begins = [*copy.begin, *[0] * len(place)]
    return [begin + index for begin, index in zip(begins, place, strict=False)]
