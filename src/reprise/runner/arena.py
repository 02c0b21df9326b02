"""Memory on the device that is filled from the host, and the one way from there to here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprise.platforms import Platform

Ints = np.ndarray[Any, Any]

ALIGNMENT = 256
"""Bytes; each array begins at a multiple, as if it had been allocated on its own."""
GAP = 1 << 16
"""Bytes between two parts of a step's inputs up to which one copy takes both: at the speed of a
bus that is a microsecond or two, and a second copy costs the device as much and the host more."""


def to_device(array: Ints, platform: Platform) -> Tensor:
    """The array on the device, without waiting for the work that the device has to do before."""
    host = torch.from_numpy(array)
    if platform.pins_memory:
        host = host.pin_memory()
    target = torch.empty(host.shape, dtype=host.dtype, device=platform.device)
    platform.upload(host, target)
    return target


class Arena:
    """Arrays in one piece of device memory, filled from one piece of host memory.

    Where the device reads host memory as it is, both are one. Elsewhere the host side is a pair
    of page-locked buffers in turn, since a copy may still be under way when the next step is
    filled; at most one step may be outstanding.

    Args:
        arrays: Length and dtype of each, in the order in which they lie in memory.
        platform: Where the device side lives.
        shared: Whether the device reads host memory; None: as the platform's does.
    """

    def __init__(
        self,
        arrays: Sequence[tuple[int, torch.dtype]],
        platform: Platform,
        shared: bool | None = None,
    ) -> None:
        begins, end = [], 0
        for length, dtype in arrays:
            begins.append(end)
            end += -(-length * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._platform = platform
        self.shared = platform.device.type == "cpu" if shared is None else shared
        self._device = torch.zeros(end, dtype=torch.uint8, device=platform.device)
        if self.shared:
            self._staging = [self._device]
        else:
            pin = platform.pins_memory
            self._staging = [torch.zeros(end, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self._turn = 0
        self.arrays = [
            StagedArray(self, begin, length, dtype)
            for begin, (length, dtype) in zip(begins, arrays, strict=True)
        ]

    def flip(self) -> None:
        """Switch to the other staging buffer; its old content is stale."""
        self._turn = (self._turn + 1) % len(self._staging)

    def upload(self, spans: Sequence[tuple[int, int]]) -> None:
        """Make parts of the host side visible on the device.

        Args:
            spans: (begin, end) of each in bytes, ascending. What lies in a small gap between two
                may be sent along, stale as it may be.
        """
        if self.shared:
            return
        begin, end = spans[0]
        for next_begin, next_end in spans[1:]:
            if next_begin - end > GAP:
                self._copy(begin, end)
                begin = next_begin
            end = next_end
        self._copy(begin, end)

    def _copy(self, begin: int, end: int) -> None:
        if end > begin:
            source = self._staging[self._turn][begin:end]
            self._platform.upload(source, self._device[begin:end])


class StagedArray:
    """One array of an arena: [length] on the device, and the host side to fill it from."""

    def __init__(self, arena: Arena, begin: int, length: int, dtype: torch.dtype) -> None:
        self._arena = arena
        self._begin = begin
        self._itemsize = dtype.itemsize
        end = begin + length * dtype.itemsize
        self.device = arena._device[begin:end].view(dtype)
        self._hosts: list[Ints] = [each[begin:end].view(dtype).numpy() for each in arena._staging]

    @property
    def host(self) -> Ints:
        """Write here, then upload."""
        return self._hosts[self._arena._turn]

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Where elements ``begin`` to ``end`` lie in the arena, in bytes."""
        return self._begin + begin * self._itemsize, self._begin + end * self._itemsize
