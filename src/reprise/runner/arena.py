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
MOST_STAGING = 4
"""Buffers of the host side: for a step and its padding, while those of the step before are on
their way."""


def to_device(array: Ints, platform: Platform, target: Tensor | None = None) -> Tensor:
    """The array on the device, in ``target`` if that is given, without waiting for the work that
    the device has to do before."""
    host = torch.from_numpy(array)
    if platform.pins_memory:
        host = host.pin_memory()
    if target is None:
        target = torch.empty(host.shape, dtype=host.dtype, device=platform.device)
    platform.upload(host, target)
    return target


class Arena:
    """Arrays in one piece of device memory, filled from one piece of host memory.

    Where the device reads host memory as it is, both are one. Elsewhere the host side is a few
    page-locked buffers in turn, since copies may still be under way when the next step is filled:
    a buffer is written again when the copies from it have run.

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
        self._staging: list[Tensor] = []
        self._sent: list[Any] = []
        """Of each buffer the event behind the last copy from it."""
        self._turn = 0
        self.arrays = [
            StagedArray(self, begin, length, dtype)
            for begin, (length, dtype) in zip(begins, arrays, strict=True)
        ]
        self._add(self._device if self.shared else None)

    def _add(self, buffer: Tensor | None = None) -> None:
        if buffer is None:
            pin = self._platform.pins_memory
            buffer = torch.zeros(len(self._device), dtype=torch.uint8, pin_memory=pin)
        self._staging.append(buffer)
        self._sent.append(self._platform.event())
        for each in self.arrays:
            each.add_host(buffer)

    def flip(self) -> None:
        """Switch to a staging buffer that no copy reads; its old content is stale.

        Waits if as many steps are outstanding as there may be buffers.
        """
        if self.shared:
            return
        count = len(self._staging)
        following = [(self._turn + 1 + each) % count for each in range(count - 1)]
        free = next((each for each in following if self._sent[each].query()), None)
        if free is None and count < MOST_STAGING:
            self._add()
            free = count
        elif free is None:
            free = following[0]
            self._sent[free].synchronize()
        self._turn = free

    def upload(self, spans: Sequence[tuple[int, int]]) -> None:
        """Make parts of the host side visible on the device.

        Args:
            spans: (begin, end) of each in bytes, in any order. What lies in a small gap between two
                may be sent along, stale as it may be.
        """
        if self.shared:
            return
        (begin, end), *others = sorted(spans)
        for next_begin, next_end in others:
            if next_begin - end > GAP:
                self._copy(begin, end)
                begin, end = next_begin, next_end
            else:
                end = max(end, next_end)
        self._copy(begin, end)
        self._sent[self._turn].record(self._platform.current_stream())

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
        self._hosts: list[Ints] = []

    def add_host(self, buffer: Tensor) -> None:
        """Take in one more of the arena's host buffers."""
        begin, end = self._begin, self._begin + self.device.nbytes
        self._hosts.append(buffer[begin:end].view(self.device.dtype).numpy())

    @property
    def host(self) -> Ints:
        """Write here, then upload."""
        return self._hosts[self._arena._turn]

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Where elements ``begin`` to ``end`` lie in the arena, in bytes."""
        return self._begin + begin * self._itemsize, self._begin + end * self._itemsize
