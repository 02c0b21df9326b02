"""Graphs that make steps no faster."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from reprise.distributed import Agreement
from reprise.errors import describe
from reprise.graphs.capture import BucketGraph
from reprise.graphs.contract import Computation
from reprise.graphs.padding import compute_padding
from reprise.graphs.trust import Ledger
from reprise.platforms import Platform
from reprise.shape import StepShape

logger = logging.getLogger(__name__)

USELESS = 0.85
BUSY_SECONDS = 0.005
"""A graph whose replay takes this share of eager execution's time, and so long, gains nothing:
while the device computes, the host is ahead."""


class Useless:
    """Finds the smallest graph of mixed steps that gains nothing: no larger one does. To capture
    and prove these would take as long as to do it for others, and memory is kept free for the
    largest.

    What counts is a step of short requests, of which a prompt alone is one: beside the longest
    contexts, which graphs are proven on, attention keeps any device busy.

    Args:
        computation: What may be captured.
        platform: The device.
        agreement: Of the ranks that compute together.
    """

    def __init__(self, computation: Computation, platform: Platform, agreement: Agreement) -> None:
        self._computation = computation
        self._platform = platform
        self._agreement = agreement
        self._agree = agreement.all
        # Without a device of its own there is no other time than the host's.
        self.enabled = platform.asynchronous
        """Else all graphs are proven and used, whatever they gain."""
        self.found: BucketGraph | None = None
        """The smallest that was captured."""
        self.foreseen: int | None = None
        """The smallest size that is not even captured."""
        self.reason = ""
        """Why."""

    def foresee(self, shapes: Sequence[StepShape]) -> None:
        """Find the smallest step whose eager execution keeps the device busy and has been submitted
        long before the device is done: a graph would save what nothing waits for. The static inputs
        are not as before.

        Args:
            shapes: Of mixed steps, small ones first.
        """
        least, most = 0, len(shapes)
        while self.enabled and least < most:
            middle = (least + most) // 2
            if self._host_is_ahead(shapes[middle]):
                most = middle
            else:
                least = middle + 1
        if most < len(shapes):
            self.foreseen = shapes[most].size
            logger.info(
                "graphs that would gain nothing are not captured: mixed steps of %d tokens and "
                "more (%s)", self.foreseen, self.reason,
            )  # fmt: skip

    def _host_is_ahead(self, shape: StepShape) -> bool:
        for _ in range(2):  # the first pass may load kernels
            ahead = False
            try:
                self._platform.synchronize()
                began = time.perf_counter()
                with self._computation.ops.computing():
                    compute_padding(self._computation, shape)
                submitted = time.perf_counter() - began
                self._platform.synchronize()
                total = time.perf_counter() - began
                ahead = total >= BUSY_SECONDS and submitted <= USELESS * total
            except Exception as error:  # a capture of it will say what is wrong
                self._agreement.fell_out(f"a step of {shape}: {describe(error)}")
            if self._agree(ahead):
                self.reason = (
                    f"at {shape.size} tokens the host has submitted everything after "
                    f"{1e3 * submitted:.1f} ms, and the device is done after {1e3 * total:.1f}"
                )
                return True
        return False

    def forget(self) -> None:
        """There are no graphs yet."""
        self.found = None

    def look_at(self, bucket: BucketGraph) -> None:
        """Both ways of the bucket's steps have been timed, beside the longest contexts. Where the
        device was what took long there, a plain step decides; the static inputs are not as before
        then."""
        info = bucket.info
        if not self.enabled or bucket.graph is None or info.phase != "mixed":
            return
        slow = info.replay_seconds >= max(USELESS * info.eager_seconds, BUSY_SECONDS)
        # A host that was busy with something else took long for both: that says nothing.
        slow &= info.submit_seconds <= USELESS * info.eager_seconds
        if self.found is None and self._agree(slow) and self._host_is_ahead(bucket.shape):
            self.found = bucket

    def drop(self, buckets: Sequence[BucketGraph], ledger: Ledger) -> None:
        """Run the steps of graphs that gain nothing eagerly, though nothing is wrong with them."""
        if self.found is None:
            return
        least = self.found.info
        dropped = []
        for bucket in buckets:
            info = bucket.info
            if bucket.graph is None or info.phase != "mixed" or info.bucket < least.bucket:
                continue
            dropped.append(info.name)
            bucket.graph, info.dropped = None, self.reason
            info.executor, info.segments, info.breaks = "none", 0, 0
            ledger.leave(bucket.key)
        logger.info(
            "graphs that gain nothing are left out: %s (%s)", ", ".join(dropped), self.reason
        )
