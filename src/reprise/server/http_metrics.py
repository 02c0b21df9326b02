"""Metrics of the HTTP processes and of the engine, in Prometheus's text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable, which prometheus_client reads when it is imported."""
_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
PROBES = frozenset({"/health", "/ready", "/ping", "/metrics"})
"""Paths that are asked every few seconds: neither counted nor logged."""


class HttpMetrics:
    """Counts replies of this process, or of all HTTP processes where they share a directory
    (:data:`SHARED`).

    Args:
        paths: That are known; others count together, however many a client thinks of.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self._paths = frozenset(paths)
        labels = ["handler", "method"]
        self._requests = Counter(
            "http_requests", "Replies by status.", [*labels, "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds", "From request to the end of the reply.", labels,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._bytes = Summary(
            "http_response_size_bytes", "Bodies of replies.", ["handler"], registry=self.registry
        )
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram, Summary]] = {}
        """What a reply of a handler, method and kind of status counts in: to find these takes
        longer than to count."""

    def exposed(self) -> CollectorRegistry:
        """What a scraper is shown."""
        if SHARED not in os.environ:
            return self.registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return registry

    def answered(self, method: str, path: str, status: int, seconds: float, size: int) -> None:
        """A reply is complete, or its client gone."""
        if path in PROBES:
            return
        handler = path if path in self._paths else "other"
        method = method if method in _METHODS else "other"
        key = (handler, method, status // 100)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = (
                self._requests.labels(handler, method, f"{status // 100}xx"),
                self._seconds.labels(handler, method),
                self._bytes.labels(handler),
            )
        count, duration, bytes_ = series
        count.inc()
        duration.observe(seconds)
        bytes_.observe(size)


def exposition(facts: list[list[Any]], served: str, http: CollectorRegistry) -> bytes:
    """Everything, as a scraper reads it.

    Args:
        facts: Of the engine, as :func:`reprise.server.facts.metric_facts` gives them.
        served: The model's name for clients: the label ``model_name``.
        http: Metrics of HTTP.
    """
    registry = CollectorRegistry()
    registry.register(_Engine(facts, served))
    return bytes(generate_latest(registry) + generate_latest(http))


class _Engine(Collector):
    def __init__(self, facts: list[list[Any]], served: str) -> None:
        self._facts = facts
        self._served = served

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Any] = {}
        for kind, name, labels, value in self._facts:
            labels = {**labels, "model_name": self._served}
            if kind == "gauge":
                family = families.setdefault(
                    name, GaugeMetricFamily(name, _HELP, labels=list(labels))
                )
                family.add_metric(list(labels.values()), value)
            elif kind == "counter":
                family = families.setdefault(
                    name, CounterMetricFamily(name, _HELP, labels=list(labels))
                )
                family.add_metric(list(labels.values()), value)
            else:
                buckets, total = value
                family = families.setdefault(
                    name, HistogramMetricFamily(name, _HELP, labels=list(labels))
                )
                family.add_metric(list(labels.values()), list(buckets.items()), total)
        yield from families.values()


_HELP = "As of vLLM's metric of this name; docs/serving.md has Reprise's own."
