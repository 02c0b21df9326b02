"""The graph matrix as data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from reprise.shape import PHASES, Phase

PROVEN = ("start", "family", "live")
STATES = (*PROVEN, "not yet met", "refused", "not used")
"""What can be known of a fact and a graph; the first four are those of ``GraphInfo.facts``."""


def row(owner: str, executor: str) -> str:
    """What an executor's part of the matrix is called; the target's owner has no name."""
    return f"{owner}, {executor}" if owner else executor


def executor_of(row: str) -> str:
    """``none`` stands for eager execution."""
    return row.rpartition(", ")[2]


def shown(row: str) -> str:
    """The row's name for people."""
    return f"{row.removesuffix('none')}eager" if executor_of(row) == "none" else row


@dataclass
class Where:
    """The place in the model at which a graph first leaves the path of eager execution."""

    op: str
    """Name of the op, such as ``paged_attention``."""
    call: int
    """Calls of the op in the forward pass before this one."""
    module: str
    """``model.layers.3.self_attn``; empty if the op belongs to no module."""
    layer: int | None
    """Number in ``module``, if it has one."""
    tensor: str = ""
    """Argument of the op, or ``result``; empty if unknown, as where capture failed."""
    segment: int | None = None
    produced: bool = True
    """The op computed it wrong; else it received it wrong."""
    after: str | None = None
    """The last op that was right, where ``produced`` is false."""

    def __str__(self) -> str:
        place = f"layer {self.layer}" if self.layer is not None else self.module
        text = f"{self.op} #{self.call}" + (f" in {place}" if place else "")
        if self.tensor:
            text += f", {'tensor' if self.produced else 'received'} {self.tensor}"
        if self.segment is not None:
            text += f", segment {self.segment}"
        return text


@dataclass
class MatrixCell:
    """One executor at one bucket and context length."""

    executor: str
    """Behind the name of what drafts, if it is of its graphs: see :func:`row`."""
    phase: Phase
    bucket: int
    context: int
    """Tokens of the step's longest request, its new ones included."""
    captured: bool = False
    verified: bool = False
    """Replay and eager execution agreed, bit by bit where all ops are deterministic."""
    largest_difference: float | None = None
    """In the first tensor that differs; NaN: the replay left values unwritten."""
    tensor: str | None = None
    """The output or state that differs first; else the memory beside that the graph changed, with
    its block."""
    eager_ms: float | None = None
    """Where the report has a row of eager execution: what stands there."""
    replay_ms: float | None = None
    sure: bool = False
    """Every turn of eager execution and replay agrees on which is faster."""
    reason: str | None = None
    """Why the cell is bad."""
    where: Where | None = None

    @property
    def bad(self) -> bool:
        return self.reason is not None

    @property
    def speedup(self) -> float | None:
        """Eager time by replay time."""
        if not self.eager_ms or not self.replay_ms:
            return None
        return self.eager_ms / self.replay_ms

    @property
    def name(self) -> str:
        return f"{self.executor} {self.phase}[{self.bucket}] at {self.context} tokens"


@dataclass
class Proof:
    """What start-up's verification made of one graph."""

    executor: str
    phase: Phase
    bucket: int
    verdict: str
    """``GraphInfo.proof``, ``refused``, or ``not used``."""
    probes: int
    planned_probes: int
    pairs: int
    """Facts about steps, and pairs of facts, for which the graph is trusted."""
    facts: dict[str, str] = field(default_factory=dict)
    """One of :data:`STATES` of every fact; empty if the graph does not run."""
    reason: str | None = None
    """Why it does not run."""
    where: Where | None = None
    """The op that the reason names, if it does."""

    @property
    def refused(self) -> bool:
        return self.verdict == "refused"

    @property
    def name(self) -> str:
        return f"{self.executor} {self.phase}[{self.bucket}] at start-up"

    def state(self, fact: str) -> str:
        return self.facts.get(fact, self.verdict)


@dataclass(frozen=True)
class Failure:
    """One line of what is wrong."""

    name: str
    reason: str
    where: Where | None
    """None: it is wrong beside the results of ops, or was not traced to one."""
    tensor: str
    """What differs or was changed, as far as it is known; with its block."""
    difference: float | None = None


@dataclass
class Bar:
    """A part of a step: a graph segment, a break op, or an op or the rest of an eager step."""

    kind: Literal["graph", "break", "op", "rest"]
    label: str
    ms: float
    module: str = ""
    ops: list[str] = field(default_factory=list)
    """Of a graph segment, in order."""


@dataclass
class Timeline:
    """One step of one executor."""

    executor: str
    phase: Phase
    bucket: int
    context: int
    total_ms: float
    """The step without stops between its parts; the bars, timed one by one, may add up to more."""
    bars: list[Bar]

    @property
    def bar_ms(self) -> float:
        return sum(each.ms for each in self.bars)


@dataclass
class BucketMemory:
    """Graph memory of one bucket, in bytes."""

    executor: str
    phase: Phase
    bucket: int
    predicted: int | None
    actual: int
    """What capture took of the device's free memory, or by which the pool grew."""


@dataclass
class Absent:
    """A part of the matrix that cannot be had here."""

    executor: str
    phase: Phase
    reason: str


@dataclass
class GraphMatrix:
    """All that ``reprise doctor graphs`` knows."""

    facts: dict[str, Any]
    """Model, device, dtype, versions, date, command."""
    executors: list[str]
    buckets: dict[Phase, list[int]]
    contexts: list[int]
    phases: dict[str, list[Phase]] = field(default_factory=dict)
    """Of executors whose owner has steps of one phase alone."""
    fault: dict[str, str] | None = None
    """``name``, ``op``, ``summary`` of the fault that was injected."""
    cells: list[MatrixCell] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    """What start-up proves of each graph."""
    absent: list[Absent] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    memory: list[BucketMemory] = field(default_factory=list)
    memory_note: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[MatrixCell]:
        return [each for each in self.cells if each.bad]

    @property
    def refused(self) -> list[Proof]:
        """The graphs that start-up refuses although no cell shows why."""
        shown = {(each.executor, each.phase, each.bucket) for each in self.bad}
        return [
            each
            for each in self.proofs
            if each.refused and (each.executor, each.phase, each.bucket) not in shown
        ]

    @property
    def failures(self) -> list[Failure]:
        """Everything that is wrong, cells first."""
        found = []
        for each in self.bad:
            tensor = (each.where.tensor if each.where is not None else "") or each.tensor or ""
            reason = each.reason or ""
            found.append(Failure(each.name, reason, each.where, tensor, each.largest_difference))
        return found + [
            Failure(each.name, each.reason or "", each.where, "") for each in self.refused
        ]

    @property
    def ok(self) -> bool:
        return not self.bad and not self.refused

    @property
    def graphs(self) -> list[MatrixCell]:
        """The cells that are about a graph: all but eager execution's."""
        return [each for each in self.cells if executor_of(each.executor) != "none"]

    def rows(self, phase: Phase) -> list[str]:
        """The executors, but for those of owners that have no steps of the phase."""
        return [each for each in self.executors if phase in self.phases.get(each, PHASES)]

    def cell(self, executor: str, phase: str, bucket: int, context: int) -> MatrixCell | None:
        wanted = (executor, phase, bucket, context)
        found = (e for e in self.cells if (e.executor, e.phase, e.bucket, e.context) == wanted)
        return next(found, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: numbers that JSON lacks become text (``"nan"``)."""
        data = dataclasses.asdict(self)
        for cell, made in zip(self.cells, data["cells"], strict=True):
            made["speedup"] = cell.speedup
        plain: dict[str, Any] = _plain(data)
        return {"ok": self.ok, **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
