"""What a graph runner did and refused to do, as data."""

from __future__ import annotations

import dataclasses
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
    dropped: str | None = None
    """Why a graph that could be captured is not used although nothing is wrong with it."""
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

    @property
    def replays(self) -> int:
        return sum(each.replays for each in self.graphs)

    @property
    def quarantined(self) -> list[GraphInfo]:
        return [each for each in self.graphs if each.quarantined is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)
