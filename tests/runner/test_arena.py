"""Host memory that a copy still reads is not written: on a device whose copies run when told."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from reprise.platforms import Platform
from reprise.platforms.cpu import CpuPlatform
from reprise.runner.arena import GAP, MOST_STAGING, Arena


class Event:
    def __init__(self, queue: list) -> None:
        self._queue, self._ahead = queue, 0

    def record(self, stream: object = None) -> None:
        self._ahead = len(self._queue)

    def query(self) -> bool:
        return self._ahead == 0 or self._ahead <= self._queue.count(None)

    def synchronize(self) -> None:
        for number in range(self._ahead):
            run(self._queue, number)


def run(queue: list, number: int) -> None:
    if queue[number] is not None:
        source, target = queue[number]
        target.copy_(source)
        queue[number] = None


class LatePlatform(CpuPlatform):
    """Copies are asynchronous, and as late as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list = []

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.queue.append((source, target))

    def event(self, *, timing: bool = False):
        return Event(self.queue)


@pytest.mark.parametrize("steps", [1, MOST_STAGING - 1, 3 * MOST_STAGING])
def test_each_copy_takes_what_was_written_for_it(steps: int) -> None:
    platform = LatePlatform()
    arena = Arena([(4, torch.int64)], platform, shared=False)
    (array,) = arena.arrays
    for value in range(steps):
        arena.flip()
        array.host[:] = value
        arena.upload([array.span(0, 4)])
    assert len(arena._staging) <= MOST_STAGING
    late = [each for each in platform.queue if each is not None]
    assert len(late) == min(steps, MOST_STAGING), "it waits for no more than it must"
    for number in range(len(platform.queue)):
        if platform.queue[number] is not None:
            run(platform.queue, number)
            assert array.device.tolist() == [number] * 4


def test_buffers_are_used_again_when_their_copies_have_run() -> None:
    platform = LatePlatform()
    arena = Arena([(4, torch.int64)], platform, shared=False)
    (array,) = arena.arrays
    for value in range(20):
        arena.flip()
        array.host[:] = value
        arena.upload([array.span(0, 4)])
        run(platform.queue, value)
    assert len(arena._staging) <= 2


@settings(max_examples=60)
@given(data=st.data())
def test_what_is_uploaded_arrives_in_whatever_order_it_is_named(
    platform: Platform, data: st.DataObject
) -> None:
    """Arrays that are near each other, and arrays that are not."""
    length = st.sampled_from([1, 5, 300, GAP // 8, GAP // 4])
    lengths = data.draw(st.lists(length, min_size=1, max_size=6))
    arena = Arena([(each, torch.int64) for each in lengths], platform, shared=False)
    for array in arena.arrays:
        array.host[:] = torch.randint(1, 1 << 40, (len(array.host),)).numpy()
    parts = []
    for which in data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8)):
        begin = data.draw(st.integers(0, lengths[which] - 1))
        parts.append((arena.arrays[which], begin, data.draw(st.integers(begin, lengths[which]))))
    arena.upload([array.span(begin, end) for array, begin, end in parts])
    for array, begin, end in parts:
        assert array.device[begin:end].tolist() == array.host[begin:end].tolist()
