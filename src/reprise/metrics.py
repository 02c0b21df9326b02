"""Numbers about an engine, in Prometheus's terms and with the types of vLLM's ``get_metrics``.

Names are vLLM's behind ``reprise:``, so that a dashboard needs another prefix and nothing else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Metric:
    """A name, and labels that tell metrics of one name apart."""

    name: str
    labels: dict[str, str]


@dataclass
class Counter(Metric):
    """A whole number that only grows."""

    value: int


@dataclass
class Gauge(Metric):
    """A number that goes up and down."""

    value: float


@dataclass
class Vector(Metric):
    """Several counters in an order. No metric of Reprise is one yet."""

    values: list[int]


@dataclass
class Histogram(Metric):
    """How often values up to a bound were seen."""

    count: int
    """Of all values."""
    sum: float
    """Of all values."""
    buckets: dict[str, int]
    """Upper bound to the number of values up to it; the last bound is ``+Inf``."""


class Distribution:
    """Counts values as they come, in time that does not grow with their number.

    Args:
        bounds: Upper bounds, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def histogram(self, name: str, labels: dict[str, str]) -> Histogram:
        """What was counted so far."""
        buckets, total = {}, 0
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            buckets["+Inf" if bound is None else f"{float(bound)}"] = total
        return Histogram(name, dict(labels), total, self._sum, buckets)


def steps_1_2_5(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to ``largest``."""
    found, power = [], 1
    while power <= largest:
        found += [digit * power for digit in (1, 2, 5) if digit * power <= largest]
        power *= 10
    return found
