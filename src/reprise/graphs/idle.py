"""Probes that start-up had no time for, met while no request runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from reprise.distributed import Agreement
from reprise.graphs.capture import BucketGraph, Key
from reprise.graphs.contract import Probe
from reprise.graphs.judge import Judge
from reprise.graphs.prove import Prover
from reprise.graphs.replay import Replays
from reprise.graphs.verify import BrokenOff

logger = logging.getLogger(__name__)

MOST_IDLE_SECONDS = 0.1
"""What a comparison takes at most that is made while no request runs: one that comes waits for
it."""


def nobody() -> bool:
    """No request waits."""
    return False


class IdleProof:
    """Compares graphs on their planned probes, one at a time.

    Args:
        prover: Knows what is lacking, and takes down what was proven.
        judge: Compares.
        replays: Refuse a graph that is wrong, as if a canary had found it.
        agreement: Of the ranks that compute together.
        buckets: All graphs.
    """

    def __init__(
        self,
        prover: Prover,
        judge: Judge,
        replays: Replays,
        agreement: Agreement,
        buckets: Mapping[Key, BucketGraph],
    ) -> None:
        self._prover = prover
        self._judge = judge
        self._replays = replays
        self._agree, self._alone = agreement.all, agreement.size == 1
        self._buckets = buckets
        self._cannot_run: set[Key] = set()
        """Graphs of which a probe did not run, for want of memory or of blocks."""

    def advance(self, wanted: Callable[[], bool] = nobody) -> bool:
        """Make one comparison. No step may be under way; what requests have left in the caches
        stays.

        Args:
            wanted: Whether a request waits: then it is given up, if nothing was replayed yet, and
                made some other time. Not where several ranks make it.

        Returns:
            Whether there may be more to do.

        Raises:
            WeightsLostError: A graph has changed weights that cannot be loaded again.
        """
        candidates = [each for each in self._buckets.values() if each.key not in self._cannot_run]
        found = self._prover.lacking(candidates, MOST_IDLE_SECONDS)
        if found is None:
            return False
        bucket, probe = found
        other = self._prover.other(bucket, bucket.info.probes)
        # Until all is seen to.
        self._replays.interrupted = bucket if other is None else other
        self._compare(bucket, probe, other, wanted)
        self._replays.interrupted = None
        return True

    def _compare(
        self,
        bucket: BucketGraph,
        probe: Probe,
        other: BucketGraph | None,
        wanted: Callable[[], bool],
    ) -> None:
        """Compare the bucket's graph on the probe, behind a replay of another one."""

        def go_on() -> None:
            if self._alone and wanted():
                raise BrokenOff

        before = self._judge.run_first(other, lambda: self._replays.scope(bucket))
        if other is not None and before.ran and not self._agree(before.right):
            # It was right at start.
            replayed = f"replay of probe {other.probes[0].name!r}"
            self._replays.make_good(other, other.probes[0].live, before, replayed)
            return
        self._replays.interrupted = bucket
        timed = not bucket.info.replay_seconds  # by which its canaries are spaced
        # All weights: after start-up nobody else looks at them all.
        try:
            verdict = self._judge.compare(
                bucket,
                probe,
                timed=timed,
                scope=lambda: replace(self._replays.scope(bucket), part=None),
                cold=bucket.info.probes == 0,
                behind=before.ran,
                go_on=go_on,
            )
        except BrokenOff:
            return
        if not self._agree(verdict.ran):
            self._cannot_run.add(bucket.key)
            logger.warning(
                "graph %s: probe %r did not run and its graph stays %s: %s",
                bucket.info.name, probe.name, bucket.info.proof, verdict.told,
            )  # fmt: skip
        elif self._agree(verdict.right):
            bucket.info.probes += 1
            if timed:
                self._judge.agree_on_times(bucket)
            self._prover.met(bucket, probe, blind=verdict.blind)
            self._tell_progress()
        else:
            self._replays.make_good(bucket, probe.live, verdict, f"probe {probe.name!r}")

    def _tell_progress(self) -> None:
        """Log one line when the last graph has met all its probes."""
        buckets = list(self._buckets.values())
        self._prover.conclude(buckets)
        running = [each.info for each in buckets if each.graph is not None]
        if all(each.verified for each in running):
            logger.info("graphs: all %d are verified, while no request ran", len(running))
