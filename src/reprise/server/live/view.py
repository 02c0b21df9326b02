"""The data of the live view: one :class:`View` is one event."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["loading", "serving", "silent", "draining", "lost"]

MARKS = {"start": "s", "live": "l", "family": "f", "not yet met": "."}
"""How a fact was proven of a graph, in one letter; a space: the graph has no such fact."""


@dataclass
class Latency:
    """Of requests that have ended, in seconds; interpolated in the buckets of a histogram, as
    Prometheus does. None: there was none."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float | None
    count: int
    """Values behind these numbers."""


@dataclass
class Latencies:
    """Three distributions, all over the same time."""

    seconds: float | None
    """Behind now; None: since the start, where in the last minute no request has ended."""
    first_token: Latency
    """From a request's arrival to its first token."""
    inter_token: Latency
    """Between two emissions of a request, of which each may have several tokens."""
    total: Latency
    """From a request's arrival to its end."""


@dataclass
class Requests:
    """Counted over all engines."""

    running: int
    waiting: int
    finished: dict[str, int]
    """By finish reason, from the start."""
    preemptions: int
    """From the start."""


@dataclass
class Tokens:
    """Counted over all engines."""

    prompt: int
    """From the start, like the next."""
    generated: int
    prompt_per_second: float
    """Over the last few seconds, like the next."""
    generated_per_second: float


@dataclass
class CacheUse:
    """Blocks that requests own; of states, slots."""

    engine: int
    lifetime: str
    """``kept``, ``window of N`` or ``state``."""
    used: int
    total: int
    """All that requests can own; lifetimes whose blocks are alike share them."""


@dataclass
class PrefixCache:
    """Prefix cache figures in tokens, from the start."""

    queries: int
    hits: int


@dataclass
class Drafts:
    """Figures of speculative decoding, from the start."""

    drafts: int
    drafted: int
    accepted: int
    by_place: list[float]
    """Of all drafts, the part that counted up to each place."""


@dataclass
class Graph:
    """One bucket; words as of :class:`reprise.graphs.report.GraphInfo`."""

    name: str
    owner: str
    phase: str
    bucket: int
    planned: str
    executor: str
    proof: str
    verified: bool
    quarantined: str | None
    """Why it is not replayed."""
    dropped: str | None
    replays: int
    eager_steps: int
    """Steps of kinds that were not proven, run eagerly."""
    canaries: int
    canary_every: int | None
    probes: int
    planned_probes: int
    marks: str
    """A letter of :data:`MARKS` for each of :attr:`Graphs.facts`."""


@dataclass
class Graphs:
    """All of one engine; counts are from the start."""

    engine: int
    requested: str
    plan: dict[str, str]
    """The executor of each phase."""
    verify: str
    downgrades: list[str]
    replays: int
    eager_steps: int
    """Steps that no graph ran."""
    canaries: int
    canary_failures: int
    facts: list[str]
    graphs: list[Graph]


@dataclass
class View:
    """All that there is to see."""

    state: State
    """``silent``: the engine has not answered for some seconds, as in a long step."""
    message: str | None
    """About the state, for people."""
    time: float
    """Of this event, in seconds since 1970."""
    model: str
    engine: dict[str, Any] = field(default_factory=dict)
    """``device``, ``dtype``, ``version``, ``max_model_len``."""
    requests: Requests | None = None
    """None, like all that follows: no engine has answered yet."""
    tokens: Tokens | None = None
    latencies: Latencies | None = None
    caches: list[CacheUse] = field(default_factory=list)
    prefix: PrefixCache | None = None
    drafts: Drafts | None = None
    """None too where nothing is drafted."""
    graphs: list[Graphs] = field(default_factory=list)
    """Of each engine."""
