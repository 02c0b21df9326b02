"""What a graph runner did and refused to do, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reprise.graphs.plan import Executor
from reprise.shape import Phase


@dataclass
class GraphInfo:
    """One bucket: what it was to run with, what it runs with, and why."""

    phase: Phase
    bucket: int
    """Requests in the decode phase, tokens in the mixed phase."""
    query_len: int
    planned: Executor
    executor: Executor
    """What runs it now; ``none`` is eager."""
    segments: int = 0
    breaks: int = 0
    verified: bool = False
    """Its graph matched eager execution on the whole planned set of probes: its own, and those of
    the graphs that stand for its family."""
    quarantined: str | None = None
    """Why a graph that was planned is not replayed."""
    bytes: int = 0
    """By which capture made the shared memory pool grow."""
    predicted_bytes: int | None = None
    replays: int = 0
    probes: int = 0
    """On which the graph matched."""
    planned_probes: int = 0
    pairs: int = 0
    """Facts about steps, and pairs of facts, for which the graph is trusted."""
    facts: dict[str, str] = field(default_factory=dict)
    """Of every fact whether it was proven at ``start``, ``live``, on the ``family``'s anchors, or
    is ``not yet met``."""
    canaries: int = 0
    """Live steps on which it was compared with eager execution."""
    eager_steps: int = 0
    """Steps of kinds that were not proven, run eagerly instead."""
    canary_every: int | None = None
    """One in so many replays is compared; None: none for that reason alone."""
    check_seconds: float = 0.0
    """What a comparison takes."""
    replay_seconds: float = 0.0
    eager_seconds: float = 0.0
    submit_seconds: float = 0.0
    """The host's part of these."""
    dropped: str | None = None
    """Why a graph that could be captured is not used although nothing is wrong with it."""
    deferred: str | None = None
    """When a graph is captured that is not yet."""
    capture_seconds: float = 0.0
    verify_seconds: float = 0.0
    owner: str = ""
    """Which computation it is of, where an engine has several; nothing: the target's."""

    @property
    def name(self) -> str:
        return f"{self.owner} {self.phase}[{self.bucket}]".lstrip()

    @property
    def proof(self) -> str:
        """How far its graph is proven, in words."""
        if self.executor == "none":
            if self.deferred is not None:
                return "not captured yet"
            return "no graph" if self.dropped is None else "not used"
        if self.verified:
            return "verified"
        if self.probes == 0:
            return "not proven"
        if self.probes < self.planned_probes:
            return f"partly proven ({self.probes} of {self.planned_probes} probes)"
        return "proven but for its family's anchors"


@dataclass
class GraphMemory:
    """Device memory of all graphs, in bytes."""

    predicted: int | None = None
    """None: not predicted."""
    actual: int | None = None
    """Free memory before all captures minus after; None: not measured."""
    note: str = ""
    """Why there is no prediction, or what was wrong with it."""
    failed: bool = False
    """The measurement raised; the device may be unusable since."""


@dataclass
class GraphReport:
    """The state of one graph runner."""

    requested: str
    """The plan that was asked for."""
    plan: dict[str, Executor]
    """The executor of each phase, as resolved."""
    downgrades: list[dict[str, str]]
    """``phase``, ``wanted``, ``got`` and ``reason`` of each."""
    verify: str
    graphs: list[GraphInfo]
    eager_steps: int
    """Steps that no graph ran."""
    canaries: int
    """Replays that were compared with eager execution."""
    canary_failures: int
    unproven_eager: int
    """Steps of kinds that were not proven, run eagerly since canaries had cost enough."""
    bounds: dict[Executor, float]
    """Of executors whose graphs are not exact: the allowed difference, relative to a row's largest
    magnitude."""
    memory: GraphMemory
    capture_seconds: float
    verify_seconds: float
    blind_inputs: list[str] = field(default_factory=list)
    """Inputs that no probe changed: a stale value there would have gone unseen."""
    replicas: list[GraphReport] = field(default_factory=list)
    """Of each engine, where there are several; see :func:`total`."""

    @property
    def replays(self) -> int:
        return sum(each.replays for each in self.graphs)

    @property
    def quarantined(self) -> list[GraphInfo]:
        return [each for each in self.graphs if each.quarantined is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)


_COUNTS = ("bytes", "replays", "canaries", "eager_steps", "capture_seconds", "verify_seconds")


def total(reports: Sequence[GraphReport]) -> GraphReport:
    """Of engines with equal options, each with graphs of its own: counts and times are summed, a
    graph is verified if all are, and quarantined or not used if one is, with the first reason."""
    graphs: dict[str, list[tuple[int, GraphInfo]]] = {}
    for index, report in enumerate(reports):
        for each in report.graphs:
            graphs.setdefault(f"{each.name} {each.query_len}", []).append((index, each))
    notes = [each.memory.note for each in reports if each.memory.note]
    first = reports[0]
    return dataclasses.replace(
        first,
        graphs=[_total_graph(each) for each in graphs.values()],
        eager_steps=sum(each.eager_steps for each in reports),
        canaries=sum(each.canaries for each in reports),
        canary_failures=sum(each.canary_failures for each in reports),
        unproven_eager=sum(each.unproven_eager for each in reports),
        memory=GraphMemory(
            _sum_known([each.memory.predicted for each in reports]),
            _sum_known([each.memory.actual for each in reports]),
            "; ".join(dict.fromkeys(notes)),
            any(each.memory.failed for each in reports),
        ),
        capture_seconds=sum(each.capture_seconds for each in reports),
        verify_seconds=sum(each.verify_seconds for each in reports),
        blind_inputs=list(dict.fromkeys(name for one in reports for name in one.blind_inputs)),
        replicas=list(reports),
    )


def _total_graph(found: Sequence[tuple[int, GraphInfo]]) -> GraphInfo:
    infos = [each for _, each in found]
    counts = {name: sum(getattr(each, name) for each in infos) for name in _COUNTS}
    reasons: dict[str, Any] = {
        name: next(
            (
                f"replica {index}: {getattr(each, name)}"
                for index, each in found
                if getattr(each, name) is not None
            ),
            None,
        )
        for name in ("quarantined", "dropped")
    }
    worst = next((each for each in infos if each.executor == "none"), infos[0])
    return dataclasses.replace(
        infos[0],
        **counts,
        **reasons,
        executor=worst.executor,
        verified=all(each.verified for each in infos),
        probes=min(each.probes for each in infos),
        pairs=min(each.pairs for each in infos),
        predicted_bytes=_sum_known([each.predicted_bytes for each in infos]),
    )


def _sum_known(values: Sequence[int | None]) -> int | None:
    known = [each for each in values if each is not None]
    return sum(known) if len(known) == len(values) else None
