"""All buckets of a computation that have a graph, or were to have one."""

from __future__ import annotations

from collections import UserDict

from reprise.graphs.buckets import Buckets
from reprise.graphs.capture import BucketGraph, Key
from reprise.shape import StepShape


class BucketGraphs(UserDict[Key, BucketGraph]):
    """Buckets by phase, query length and size.

    Args:
        buckets: All sizes.
    """

    def __init__(self, buckets: Buckets) -> None:
        self._found: tuple[StepShape, BucketGraph | None] | None = None
        """The last shape that was looked up, and its bucket."""
        self._buckets = buckets
        super().__init__()

    def __setitem__(self, key: Key, bucket: BucketGraph) -> None:
        self._found = None
        super().__setitem__(key, bucket)

    def __delitem__(self, key: Key) -> None:
        self._found = None
        super().__delitem__(key)

    def holding(self, shape: StepShape) -> BucketGraph | None:
        """The smallest bucket that holds a step of this shape, whether it has a graph or not."""
        if self._found is not None and self._found[0] == shape:
            return self._found[1]
        size = self._buckets.bucket_for(shape.phase, shape.size)
        found = None
        if size is not None:
            found = self.get((shape.phase, shape.query_len, size))
        self._found = shape, found
        return found
