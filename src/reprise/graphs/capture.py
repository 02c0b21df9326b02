"""Capture of buckets as graphs, with the next executor where one fails."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from reprise.distributed import Agreement
from reprise.errors import describe
from reprise.garbage import uncollected
from reprise.graphs.compiled import compile_model
from reprise.graphs.contract import Computation, Probe
from reprise.graphs.padding import write_padding
from reprise.graphs.plan import FALLBACK, Executor
from reprise.graphs.pool import GraphPool
from reprise.graphs.report import GraphInfo
from reprise.graphs.segments import SegmentedGraph
from reprise.ops.registry import intercept
from reprise.ops.rehearsal import rehearsal
from reprise.platforms import Platform
from reprise.shape import Phase, StepShape

logger = logging.getLogger(__name__)

Key = tuple[Phase, int, int]
"""Phase, query length and size of a bucket."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, parts done, parts in all."""

WARN_AT_MOST = 3


@dataclass
class BucketGraph:
    """One bucket of one phase, and the graph that runs it, if any."""

    shape: StepShape
    info: GraphInfo
    graph: SegmentedGraph | None = None
    probes: list[Probe] = field(default_factory=list)
    """What it is proven on at start-up, or when nothing runs."""
    later: bool = False
    """All its probes are met when nothing runs: it was captured behind start-up, or those that were
    met count no more."""
    blind: bool = False
    """Of a probe that it was compared on the results say nothing: it is not proven on that."""

    @functools.cached_property
    def key(self) -> Key:
        return self.shape.phase, self.shape.query_len, self.shape.size

    @property
    def family(self) -> tuple[Phase, int, Executor]:
        """Graphs of one family were captured alike: what goes wrong in one may in the others."""
        return self.shape.phase, self.shape.query_len, self.info.executor


class Capturer:
    """Captures the graphs of one computation.

    Args:
        computation: What is captured.
        platform: The device.
        agreement: Of the ranks that compute together.
        pool: What the graphs share.
    """

    def __init__(
        self,
        computation: Computation,
        platform: Platform,
        agreement: Agreement,
        pool: GraphPool,
    ) -> None:
        self._computation = computation
        self._platform = platform
        self._agreement = agreement
        self.pool = pool
        self._compiled: Callable[..., Any] | None = None
        self._warm: set[tuple[StepShape, Executor]] = set()
        """What has been computed since graphs were thrown away last, and caches made anew."""
        self._logged: Counter[tuple[str, Executor]] = Counter()

    def model(self, executor: Executor) -> Callable[..., Any]:
        """What ``forward`` is to call for an executor."""
        if executor != "compiled":
            return self._computation.model
        if self._compiled is None:
            self._compiled = compile_model(self._computation.model)
        return self._compiled

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """The conditions of every capture: no gradients, the op table, no garbage collection."""
        with uncollected(), self._computation.ops.computing():
            yield

    # ---- capture -------------------------------------------------------------------------

    def capture_or_fall_back(self, bucket: BucketGraph, executor: Executor) -> None:
        """Give the bucket a graph; if it cannot be captured, the next executor, down to eager."""
        started = time.perf_counter()
        info = bucket.info
        while executor != "none":
            reason = self._try(bucket, executor)
            if reason is None:
                break
            self.quarantine(bucket, executor, reason)
            executor = FALLBACK[executor]
        info.executor = executor
        info.capture_seconds += time.perf_counter() - started

    def _try(self, bucket: BucketGraph, executor: Executor) -> str | None:
        """Capture; returns why it failed, here or on another rank.

        A vote follows each stage: a rank that failed says no before the others begin a pass over
        the model, in whose collectives they would wait for it. One that left a pass in its midst
        ends the group, unless all others did as well.
        """
        for stage in (self._prepare, self._warm_up, self._record):
            reason = None
            try:
                stage(bucket, executor)
            except Exception as error:
                self.pool.spoiled()
                reason = f"capture failed: {describe(error)}"
                if stage != self._prepare:
                    self._agreement.fell_out(f"graph {bucket.info.name}: {reason}")
            except BaseException:
                self.pool.spoiled()
                raise
            if not self._agreement.all(reason is None):
                return reason or "capture failed on another rank"
        return None

    def _prepare(self, bucket: BucketGraph, executor: Executor) -> None:
        """Do all that a rank does alone."""
        self.model(executor)
        self.pool.prepare()
        write_padding(self._computation, bucket.shape)

    def _warm_up(self, bucket: BucketGraph, executor: Executor) -> None:
        """Compile and tune kernels, and allocate workspaces, outside of the capture: once, where
        memory is predicted from several captures of a bucket. A compiler sees all layers."""
        if (bucket.shape, executor) in self._warm:
            return
        whole = executor == "compiled"
        rehearsed = contextlib.nullcontext() if whole else rehearsal()
        with self._platform.capture_stream(), intercept(None), rehearsed:
            self._computation.forward(bucket.shape, self.model(executor))
        self._warm.add((bucket.shape, executor))

    def _record(self, bucket: BucketGraph, executor: Executor) -> None:
        graph = SegmentedGraph(self._platform, self.pool.handle)
        graph.capture(
            lambda: self._computation.forward(bucket.shape, self.model(executor)),
            "nowhere" if executor == "full" else "breaks",
        )
        self.pool.keep(graph)
        bucket.graph = graph
        bucket.info.segments, bucket.info.breaks = graph.num_segments, graph.num_breaks
        bucket.info.bytes = graph.nbytes

    def discard(self) -> None:
        """Throw all graphs away, and their memory unless other owners' graphs share it."""
        self.pool.discard()
        self._compiled = None
        self._warm.clear()
        self._logged.clear()

    def quarantine(self, bucket: BucketGraph, executor: Executor, reason: str) -> None:
        """The bucket's graph is never replayed again."""
        bucket.graph = None
        info = bucket.info
        info.verified, info.segments, info.breaks, info.bytes = False, 0, 0, 0
        info.executor = "none"
        earlier = "" if info.quarantined is None else f"{info.quarantined}; then "
        info.quarantined = f"{earlier}{executor}: {reason}"
        # One cause usually fails many buckets alike; the report has them all.
        self._logged[info.phase, executor] += 1
        times = self._logged[info.phase, executor]
        if times <= WARN_AT_MOST:
            named = f"{info.owner} {bucket.shape}".lstrip()
            logger.warning("graph %s quarantined (%s): %s", named, executor, reason)
        if times == WARN_AT_MOST:
            logger.warning("further %s graphs (%s) fail silently", info.phase, executor)
