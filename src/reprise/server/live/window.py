"""Rates and percentiles of the last minute, from counts that only grow."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reprise.server.live.view import (
    CacheUse,
    Drafts,
    Graph,
    Graphs,
    Latencies,
    Latency,
    PrefixCache,
    Requests,
    Tokens,
)

WINDOW_SECONDS = 60.0
"""Of percentiles."""
RATE_SECONDS = 3.0
"""Of tokens a second: shorter than a glance, longer than most steps."""


@dataclass
class Counted:
    """Values up to each bound, and their sum, since the start."""

    buckets: dict[str, int] = field(default_factory=dict)
    sum: float = 0.0

    @property
    def count(self) -> int:
        return self.buckets.get("+Inf", 0)

    def __add__(self, other: Counted) -> Counted:
        names = self.buckets | other.buckets
        return Counted(
            {name: self.buckets.get(name, 0) + other.buckets.get(name, 0) for name in names},
            self.sum + other.sum,
        )

    def __sub__(self, earlier: Counted) -> Counted:
        buckets = {name: n - earlier.buckets.get(name, 0) for name, n in self.buckets.items()}
        return Counted(buckets, self.sum - earlier.sum)

    def quantile(self, part: float) -> float | None:
        """As Prometheus's ``histogram_quantile``: linear within a bucket; the largest bound for
        what lies beyond it. None: there are no values."""
        if self.count == 0:
            return None
        rank, below, low = part * self.count, 0, 0.0
        for name, up_to in self.buckets.items():
            if name == "+Inf":
                break
            high = float(name)
            if up_to >= rank and up_to > below:
                return low + (high - low) * (rank - below) / (up_to - below)
            below, low = up_to, high
        return low

    def latency(self) -> Latency:
        mean = self.sum / self.count if self.count else None
        return Latency(
            self.quantile(0.5), self.quantile(0.9), self.quantile(0.99), mean, self.count
        )


class Moment:
    """One answer of the engine's process, see :func:`reprise.server.live.sample.sample`.

    Args:
        at: When it came, in seconds of a monotonic clock.
        sample: The answer.
    """

    def __init__(self, at: float, sample: Mapping[str, Any]) -> None:
        self.at = at
        self.sample = sample
        self._values: dict[str, list[tuple[Mapping[str, str], Any]]] = {}
        for _, name, labels, value in sample["metrics"]:
            self._values.setdefault(name.partition(":")[2], []).append((labels, value))

    def total(self, name: str) -> float:
        """The sum of a counter or gauge over all labels."""
        return sum(value for _, value in self._values.get(name, ()))

    def by_label(self, name: str, label: str) -> dict[str, int]:
        """The sum of a counter for each value of a label."""
        found: dict[str, int] = {}
        for labels, value in self._values.get(name, ()):
            found[labels[label]] = found.get(labels[label], 0) + int(value)
        return found

    def counted(self, name: str) -> Counted:
        """A histogram, over all labels."""
        found = Counted()
        for _, (buckets, total) in self._values.get(name, ()):
            found += Counted(buckets, total)
        return found


class Window:
    """The answers of the last minute."""

    def __init__(self) -> None:
        self._moments: deque[Moment] = deque()

    def add(self, sample: Mapping[str, Any], at: float | None = None) -> None:
        """A new one; ``at`` is now unless it is said."""
        at = time.monotonic() if at is None else at
        self._moments.append(Moment(at, sample))
        # The oldest one is kept that is a whole window old: differences go back to it.
        while len(self._moments) > 1 and self._moments[1].at <= at - WINDOW_SECONDS:
            self._moments.popleft()

    def fields(self) -> dict[str, Any]:
        """The fields of a :class:`reprise.server.live.view.View` that come from the engine."""
        if not self._moments:
            return {}
        now = self._moments[-1]
        return {
            "requests": Requests(
                int(now.total("num_requests_running")),
                int(now.total("num_requests_waiting")),
                now.by_label("request_success", "finished_reason"),
                int(now.total("num_preemptions")),
            ),
            "tokens": Tokens(
                int(now.total("prompt_tokens")),
                int(now.total("generation_tokens")),
                self._rate("prompt_tokens"),
                self._rate("generation_tokens"),
            ),
            "latencies": self._latencies(),
            "caches": [CacheUse(**each) for each in now.sample["caches"]],
            "prefix": PrefixCache(
                int(now.total("prefix_cache_queries")), int(now.total("prefix_cache_hits"))
            ),
            "drafts": _drafts(now),
            "graphs": [_graphs(each) for each in now.sample["graphs"]],
        }

    def _rate(self, name: str) -> float:
        now = self._moments[-1]
        before = next(
            (each for each in reversed(self._moments) if each.at <= now.at - RATE_SECONDS),
            self._moments[0],
        )
        seconds = now.at - before.at
        return (now.total(name) - before.total(name)) / seconds if seconds else 0.0

    def _latencies(self) -> Latencies:
        now, before = self._moments[-1], self._moments[0]
        names = ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
        counted = [now.counted(f"{name}_seconds") for name in names]
        recent = [
            each - before.counted(f"{name}_seconds")
            for name, each in zip(names, counted, strict=True)
        ]
        seconds: float | None = now.at - before.at
        if not recent[-1].count:
            recent, seconds = counted, None
        return Latencies(seconds, *(each.latency() for each in recent))


def _drafts(now: Moment) -> Drafts | None:
    drafts = int(now.total("spec_decode_num_drafts"))
    if not drafts:
        return None
    places = now.by_label("spec_decode_num_accepted_tokens_per_pos", "position")
    return Drafts(
        drafts,
        int(now.total("spec_decode_num_draft_tokens")),
        int(now.total("spec_decode_num_accepted_tokens")),
        [count / drafts for _, count in sorted(places.items(), key=lambda each: int(each[0]))],
    )


def _graphs(given: Mapping[str, Any]) -> Graphs:
    graphs: Sequence[Mapping[str, Any]] = given["graphs"]
    return Graphs(**{**given, "graphs": [Graph(**each) for each in graphs]})
