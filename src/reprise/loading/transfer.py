"""Copy tensors from mapped files to where they belong, and look at their numbers."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reprise.errors import LoadError
from reprise.finite import all_finite, copy_looking
from reprise.layers import Destination
from reprise.platforms import Platform
from reprise.progress import progress

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that copy. A few read from memory as fast as it goes; more would fight for it."""
STAGING_BYTES = 8 << 20
"""Of one staging buffer, of which each thread has two. Enough to hide what it costs to start a
copy, and little enough to stay in the processor's cache until the device has read it."""
FEW_BYTES = STAGING_BYTES
"""So little is copied before threads have begun."""

SHOW_EVERY_SECONDS = 0.1


@dataclass(frozen=True)
class Copy:
    """One tensor to fill from another one; dtypes may differ."""

    name: str
    """For messages: the tensor, and where it comes from."""
    source: Tensor
    """On the host; may be the mapped content of a file."""
    target: Tensor
    """On the platform's device."""
    offset: float = 0.0
    """Added on the way."""
    convert: Callable[[Tensor], Tensor] | None = None
    """Makes of the source, on the host, what has the target's shape; None: the source has it."""
    begin: tuple[int, ...] = ()
    """Where the source begins in the tensor that it is a part of; (): it is all of it."""

    def pieces(self, nbytes: int) -> Iterator[Copy]:
        """Groups of rows with at most ``nbytes`` at the target, or one row if that has more; all
        in one if there is no more, or as long as it is to be converted."""
        if self.target.numel() == 0:
            return
        if self.convert is not None or self.target.nbytes <= nbytes:
            yield self
            return
        source, target = (torch.atleast_1d(each.detach()) for each in (self.source, self.target))
        rows = _rows(target, nbytes)
        for part, into in zip(source.split(rows), target.split(rows), strict=True):
            yield replace(self, source=part, target=into)

    def converted(self) -> Copy:
        """The same without anything to convert. Memory for it is taken now."""
        if self.convert is None:
            return self
        return replace(self, source=self.convert(self.source.cpu()), convert=None)


def copy_to(destination: Destination, source: Tensor, name: str) -> Copy:
    """Fill a destination.

    Args:
        destination: Where it goes.
        source: That part of the stored tensor which goes there.
        name: Of the copy.
    """
    begin = tuple(each.start or 0 for each in destination.part)
    return Copy(name, source, destination.target, destination.offset, destination.convert, begin)


def _rows(target: Tensor, nbytes: int) -> int:
    return max(1, nbytes // target[0].nbytes)


def transfer(copies: Sequence[Copy], platform: Platform) -> list[Copy]:
    """Make all copies; they have landed when this returns, and when it raises nothing runs on.

    Returns:
        Those with numbers that are not finite.

    Raises:
        LoadError: One of them failed; its name and the reason. The others were stopped.
    """
    pieces = [
        (number, piece)
        for number, each in enumerate(copies)
        for piece in each.pieces(STAGING_BYTES)
    ]
    total = sum(piece.target.nbytes for _, piece in pieces)
    largest = max((_largest(piece.target) for _, piece in pieces), default=0)
    odd: set[int] = set()
    of_thread = threading.local()
    # Torch converts with threads of its own: as many at a time as that leaves cores for.
    conversions = threading.BoundedSemaphore(max(1, WORKERS // torch.get_num_threads()))

    def make(number: int, piece: Copy) -> int:
        try:
            if not hasattr(of_thread, "lane"):
                platform.activate()
                kind = StagedLane if platform.pins_memory else Lane
                of_thread.lane = kind(platform, largest, conversions)
            # The mode is a thread's own; only in it may the caller's parameters be written to.
            with torch.inference_mode():
                # One at a time, or few: what is converted takes memory beside the tensor.
                with conversions if piece.convert is not None else contextlib.nullcontext():
                    made = piece.converted()
                for each in made.pieces(STAGING_BYTES):
                    if not of_thread.lane.copy(each.target, each.source, each.offset):
                        odd.add(number)
        except Exception as error:  # a device fails with errors of many types
            raise LoadError(
                f"{piece.name} cannot be copied to {platform.device}: {error}"
            ) from error
        return piece.target.nbytes

    # The caller's stream may still be making the targets; the threads use streams of their own.
    platform.synchronize()
    try:
        if total > FEW_BYTES:
            _in_threads(make, pieces, total)
        else:
            for each in pieces:
                make(*each)
    finally:
        platform.synchronize()
    return [copies[number] for number in sorted(odd)]


def _in_threads(
    make: Callable[[int, Copy], int], pieces: Sequence[tuple[int, Copy]], total: int
) -> None:
    """Call it for each, and show how many of all bytes it has made; none runs afterwards."""
    done = 0
    pool = ThreadPoolExecutor(WORKERS, "reprise-weights")
    try:
        with progress("weights (MiB)", total >> 20) as bar:
            pending = {pool.submit(make, *each) for each in pieces}
            while pending:
                # Not after each piece: the threads would wait for this one to take note.
                finished, pending = wait(pending, SHOW_EVERY_SECONDS, FIRST_EXCEPTION)
                done += sum(each.result() for each in finished)
                bar.show(bar.what, done >> 20, bar.total)
    finally:
        pool.shutdown(cancel_futures=True)


def _largest(target: Tensor) -> int:
    """Bytes of the largest piece that a target is filled in."""
    target = torch.atleast_1d(target.detach())
    return min(len(target), _rows(target, STAGING_BYTES)) * target[0].nbytes


class Lane:
    """One thread's way to the device.

    Args:
        platform: Of the targets, and active in this thread.
        nbytes: Of the largest target.
        conversions: Held while torch converts between dtypes.
    """

    def __init__(
        self, platform: Platform, nbytes: int, conversions: threading.BoundedSemaphore
    ) -> None:
        self.platform = platform
        self.conversions = conversions

    def copy(self, target: Tensor, source: Tensor, offset: float) -> bool:
        """Fill ``target`` from host memory, now or in the order of the device's work. Returns
        whether its numbers are finite."""
        host = target.device.type == "cpu"
        plain = host and target.is_contiguous() and source.is_contiguous()
        if plain and target.dtype == source.dtype:
            # Torch would start a team of threads in each of ours.
            finite = copy_looking(target, source)
        else:
            with self.conversions:
                filled = target.copy_(source) if host else source.to(target.dtype)
            finite = all_finite(filled)
            if not host:
                target.copy_(filled)
        if offset:
            target.add_(offset)
        return finite


class StagedLane(Lane):
    """Through two page-locked buffers in turn: one is filled while the device reads the other."""

    def __init__(
        self, platform: Platform, nbytes: int, conversions: threading.BoundedSemaphore
    ) -> None:
        super().__init__(platform, nbytes, conversions)
        self._stream = platform.stream()
        pin = platform.pins_memory
        buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        reads = [platform.event() for _ in buffers]
        self._turns = itertools.cycle(zip(buffers, reads, strict=True))

    def copy(self, target: Tensor, source: Tensor, offset: float) -> bool:
        buffer, read = next(self._turns)
        read.synchronize()
        staged = buffer[: target.nbytes].view(target.dtype).view(target.shape)
        finite = super().copy(staged, source, offset)
        with self.platform.use_stream(self._stream):
            target.copy_(staged, non_blocking=True)
        read.record(self._stream)
        return finite
