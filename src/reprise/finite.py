"""Whether numbers in host memory are finite, in little more time than it takes to read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 18
"""Bytes that are looked at together: what is read twice stays in the processor's cache."""
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


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity in ``tensor``: on the host, of any shape and dtype;
    integers are finite."""
    if tensor.dtype not in _FIRST and tensor.dtype not in _ONE:
        return True
    words = _words(tensor)
    step = _BLOCK // words.itemsize
    return not any(
        _any_odd(words[begin : begin + step], tensor.dtype) for begin in range(0, len(words), step)
    )


def first_odd(tensor: Tensor) -> tuple[int, ...] | None:
    """Indices of the first value that is not finite, in the order of memory; None: all are."""
    if tensor.dtype not in _FIRST and tensor.dtype not in _ONE:
        return None
    words = _words(tensor)
    step = _BLOCK // words.itemsize
    for begin in range(0, len(words), step):
        block = words[begin : begin + step]
        if _any_odd(block, tensor.dtype):
            place = begin + int(np.flatnonzero(_odd(block, tensor.dtype))[0])
            return tuple(int(each) for each in np.unravel_index(place, tuple(tensor.shape)))
    return None


def _words(tensor: Tensor) -> np.ndarray[Any, Any]:
    flat = tensor.detach().contiguous()
    # Any stride is contiguous where there is one element, but not to a view of another dtype.
    flat = flat.as_strided((flat.numel(),), (1,))
    return flat.view(torch.uint8).numpy().view(_WORDS[tensor.element_size()])


def _any_odd(words: np.ndarray[Any, Any], dtype: torch.dtype) -> bool:
    first = _FIRST.get(dtype)
    if first is None:
        return bool((words == _ONE[dtype]).any())
    # As signed integers the largest is the largest positive number, as unsigned ones the largest
    # negative one, if there is any.
    unsigned = words.view(f"u{words.itemsize}")
    sign = 1 << (8 * words.itemsize - 1)
    return bool(words.max() >= first or unsigned.max() >= sign + first)


def _odd(words: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    first = _FIRST.get(dtype)
    if first is None:
        return np.asarray(words == _ONE[dtype])
    return np.asarray((words & np.iinfo(words.dtype).max) >= first)
