"""Buckets that have no graph yet: which of them is captured next, and when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from reprise.shape import Phase, StepShape

WANTED = 8
"""Steps of a bucket that run eagerly until one of them waits for its graph: by then it saves more
than it takes."""
REASON = "captured when steps want it, or when nothing runs"


def split(shapes: Sequence[StepShape]) -> tuple[list[StepShape], list[StepShape]]:
    """What is captured at start, and what later. Of each kind the largest bucket, by which memory
    is reserved, and the smallest: what is proven of both their family is trusted with.

    Args:
        shapes: All buckets, largest first.
    """
    kinds: dict[tuple[Phase, int], list[StepShape]] = defaultdict(list)
    for each in shapes:
        kinds[each.phase, each.query_len].append(each)
    ends = {end for each in kinds.values() for end in (each[0], each[-1])}
    return [each for each in shapes if each in ends], [each for each in shapes if each not in ends]


class Deferred:
    """Buckets that wait. Every rank that computes the same steps counts the same."""

    def __init__(self) -> None:
        self._steps: dict[StepShape, int] = {}
        """How many each has had."""
        self.due = False
        """Steps have wanted one for long. Steps that have all their graphs read this alone."""

    def __len__(self) -> int:
        return len(self._steps)

    def defer(self, shapes: Sequence[StepShape]) -> None:
        """Let these wait."""
        self._steps = dict.fromkeys(shapes, 0)

    def note(self, shape: StepShape) -> None:
        """A step of the bucket ran eagerly."""
        if shape in self._steps:
            self._steps[shape] += 1
            self.due |= self._steps[shape] >= WANTED

    def take(self, least: int = 0) -> StepShape | None:
        """The bucket that most steps have wanted, and ``least`` at least, which waits no more; of
        equals the largest."""
        found = max(self._steps, key=lambda each: self._steps[each], default=None)
        if found is None or self._steps[found] < least:
            return None
        del self._steps[found]
        self.due = any(count >= WANTED for count in self._steps.values())
        return found

    def clear(self) -> None:
        """Nothing waits any more."""
        self._steps.clear()
        self.due = False
