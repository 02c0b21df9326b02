"""Graphs that make steps no faster."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from reprise.distributed import Agreement
from reprise.graphs.capture import BucketGraph
from reprise.graphs.trust import Ledger
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

USELESS = 0.85
BUSY_SECONDS = 0.005
"""A graph whose replay takes this share of eager execution's time, and so long, gains nothing:
while the device computes, the host is ahead."""


class Useless:
    """Finds the smallest graph of mixed steps that gains nothing: no larger one does. To prove
    these would take as long as to prove others.

    Args:
        platform: Where.
        agreement: Of the ranks that compute together.
    """

    def __init__(self, platform: Platform, agreement: Agreement) -> None:
        self._agree = agreement.all
        # Without a device of its own there is no other time than the host's.
        self.enabled = platform.asynchronous
        """Else all graphs are proven and used, whatever they gain."""
        self.found: BucketGraph | None = None
        """The smallest."""

    def forget(self) -> None:
        """There are no graphs yet."""
        self.found = None

    def look_at(self, bucket: BucketGraph) -> None:
        """Both ways of the bucket's steps have been timed."""
        info = bucket.info
        if not self.enabled or bucket.graph is None or info.phase != "mixed":
            return
        slow = info.replay_seconds >= max(USELESS * info.eager_seconds, BUSY_SECONDS)
        if self.found is None and self._agree(slow):
            self.found = bucket

    def drop(self, buckets: Sequence[BucketGraph], ledger: Ledger) -> None:
        """Run the steps of graphs that gain nothing eagerly, though nothing is wrong with them."""
        if self.found is None:
            return
        least = self.found.info
        reason = (
            f"at {least.bucket} tokens eager execution takes {1e3 * least.eager_seconds:.1f} ms, "
            f"a replay {1e3 * least.replay_seconds:.1f}"
        )
        dropped = []
        for bucket in buckets:
            info = bucket.info
            if bucket.graph is None or info.phase != "mixed" or info.bucket < least.bucket:
                continue
            dropped.append(info.name)
            bucket.graph, info.dropped = None, reason
            info.executor, info.segments, info.breaks = "none", 0, 0
            ledger.leave(bucket.key)
        logger.info("graphs that gain nothing are left out: %s (%s)", ", ".join(dropped), reason)
