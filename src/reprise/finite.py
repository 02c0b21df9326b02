"""Whether numbers in host memory are finite, in little more time than it takes to read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 19
"""Bytes that are looked at together: what is read again stays in the processor's cache."""
_WORDS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_FIRST = {
    torch.float64: 0x7FF << 52,
    torch.float32: 0xFF << 23,
    torch.float16: 0x1F << 10,
    torch.bfloat16: 0xFF << 7,
    torch.float8_e5m2: 0x1F << 2,
    torch.float8_e4m3fn: 0x7F,
}
"""The bits of the first positive value that is not finite. Those of the finite ones are smaller as
integers, in magnitude, for a sign comes first; what is larger is not finite either."""
_ONE = {torch.float8_e4m3fnuz: -128, torch.float8_e5m2fnuz: -128, torch.float8_e8m0fnu: -1}
"""The bits of the one value that is not finite, of dtypes that have one alone."""
_KNOWN = _FIRST.keys() | _ONE.keys()


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity in ``tensor``: on the host, of any shape and dtype;
    integers are finite."""
    return tensor.dtype not in _KNOWN or not any(
        _any_odd(block, tensor.dtype) for block in _blocks(_words(tensor))
    )


def copy_looking(target: Tensor, source: Tensor) -> bool:
    """Copy in the calling thread alone, and say whether what was copied :func:`all_finite`.

    Args:
        target: On the host, contiguous.
        source: Likewise, of its shape and dtype.
    """
    odd = False
    pairs = zip(_blocks(_words(target)), _blocks(_words(source)), strict=True)
    for into, block in pairs:
        np.copyto(into, block)
        odd = odd or (target.dtype in _KNOWN and _any_odd(into, target.dtype))
    return not odd


def first_odd(tensor: Tensor) -> tuple[int, ...] | None:
    """Indices of the first value that is not finite, in the order of memory; None: all are."""
    begin = 0
    for block in _blocks(_words(tensor)) if tensor.dtype in _KNOWN else ():
        if _any_odd(block, tensor.dtype):
            place = begin + int(np.flatnonzero(_odd(block, tensor.dtype))[0])
            return tuple(int(each) for each in np.unravel_index(place, tuple(tensor.shape)))
        begin += len(block)
    return None


def _blocks(words: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    step = _BLOCK // words.itemsize
    return (words[begin : begin + step] for begin in range(0, len(words), step))


def _words(tensor: Tensor) -> np.ndarray[Any, Any]:
    flat = tensor.detach().contiguous()
    # Any stride is contiguous where there is one element, but not to a view of another dtype.
    flat = flat.as_strided((flat.numel(),), (1,))
    return flat.view(torch.uint8).numpy().view(_WORDS[tensor.element_size()])


def _any_odd(words: np.ndarray[Any, Any], dtype: torch.dtype) -> bool:
    first = _FIRST.get(dtype)
    if first is None:
        return bool((words == _ONE[dtype]).any())
    unsigned = words.view(f"u{words.itemsize}")
    # Weights are mostly below 2, and then no exponent has its first bit.
    if not int(np.bitwise_or.reduce(unsigned)) >> (first.bit_length() - 1) & 1:
        return False
    # As signed integers the largest is the largest positive number, as unsigned ones the largest
    # negative one, if there is any.
    sign = 1 << (8 * words.itemsize - 1)
    return bool(words.max() >= first or unsigned.max() >= sign + first)


def _odd(words: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    first = _FIRST.get(dtype)
    if first is None:
        return np.asarray(words == _ONE[dtype])
    return np.asarray((words & np.iinfo(words.dtype).max) >= first)
