import functools

import torch
from torch import Tensor

AT_ONCE = 1 << 22
"""Words that are widened to 64 bits at a time; bounds the memory."""


def reference(words: Tensor, units: Tensor | None) -> Tensor:
    """A sum over each unit of memory that shows every change, also content that was moved.

    The sum modulo 2**64 of the words, each multiplied by an odd number that depends on its place
    in the unit. A change of one word always shows, since an odd number has an inverse; several
    changes cancel each other with probability 2**-32 or less, unless they were made to.

    Args:
        words: [R, N, W] int32, N units in each of R regions; the last dimension is contiguous.
        units: [K] int64, the units to sum, below N; None: all.

    Returns:
        [R, K] int64; [R, N] without ``units``.
    """
    regions, count, length = words.shape
    chosen = range(count) if units is None else units
    sums = torch.zeros((regions, len(chosen)), dtype=torch.int64, device=words.device)
    if sums.numel() == 0 or length == 0:
        return sums
    rows, columns = max(1, AT_ONCE // (regions * length)), max(1, AT_ONCE // regions)
    for first in range(0, len(chosen), rows):
        piece = slice(first, first + rows)
        found = words[:, piece if units is None else units[piece]]
        for begin in range(0, length, columns):
            part = found[:, :, begin : begin + columns]
            sums[:, piece] += (part * place_factors(begin, part.shape[2], words.device)).sum(dim=2)
    return sums


def place_factors(begin: int, count: int, device: torch.device) -> Tensor:
    """[count] int64: the odd numbers below 2**33 of the places from ``begin`` on.

    The place goes through the finalizer of MurmurHash3 (32 bits), so that no two distances between
    places have a common ratio: equal shifts of several words do not cancel.
    """
    return _kept_factors(begin, 1 << max(count - 1, 4095).bit_length(), device)[:count]


@functools.lru_cache(maxsize=16)
def _kept_factors(begin: int, count: int, device: torch.device) -> Tensor:
    x = torch.arange(begin, begin + count, dtype=torch.int64, device=device) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & 0xFFFFFFFF
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x << 1) | 1


def fake(words: Tensor, units: Tensor | None) -> Tensor:
    count = words.shape[1] if units is None else units.shape[0]
    return words.new_empty((words.shape[0], count), dtype=torch.int64)
