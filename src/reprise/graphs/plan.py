"""Which executor runs each phase: what was asked for, and what can be had."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, Literal, TypeVar, cast, get_args

from reprise.errors import ConfigError
from reprise.ops.implementation import GraphSupport, Implementation
from reprise.ops.registry import Op
from reprise.platforms import Platform
from reprise.shape import PHASES, Phase

logger = logging.getLogger(__name__)

Executor = Literal["none", "full", "breakable", "compiled"]
"""``none``: eager. ``full``: one graph a step. ``breakable``: graph segments with eager break ops
between them. ``compiled``: the same, with the code between break ops compiled."""
Wanted = Literal["auto", "none", "full", "breakable", "compiled"]

EXECUTORS: tuple[Executor, ...] = get_args(Executor)
FALLBACK: dict[Executor, Executor] = {
    "full": "breakable",
    "compiled": "breakable",
    "breakable": "none",
}
"""The executor that takes over from one that cannot be had or failed verification."""

ALIASES: dict[str, str] = {
    "none": "decode=none,mixed=none",
    "full": "decode=full,mixed=full",
    "piecewise": "decode=breakable,mixed=breakable",
    "full_decode_only": "decode=full,mixed=none",
    "full_and_piecewise": "decode=full,mixed=breakable",
}
"""vLLM's modes. Its PIECEWISE needs a compiler to find the pieces; ``breakable`` gives the same
graphs without one. Say ``compiled`` for pieces that a compiler has also optimised."""


@dataclass(frozen=True)
class Downgrade:
    """One phase that gets another executor than the one asked for."""

    phase: Phase
    wanted: Executor
    got: Executor
    reason: str

    def __str__(self) -> str:
        return f"graph plan: {self.phase}: {self.wanted} -> {self.got} ({self.reason})"


Choice = TypeVar("Choice", bound=str, covariant=True)
"""``Wanted``: what was asked for. ``Executor``: what it was resolved to."""


@dataclass(frozen=True)
class GraphPlan(Generic[Choice]):
    """The executor of each phase."""

    decode: Choice
    mixed: Choice
    downgrades: tuple[Downgrade, ...] = ()
    """Why it is not what was asked for; a plan that was asked for has none."""

    def of(self, phase: Phase) -> Choice:
        return self.decode if phase == "decode" else self.mixed

    @property
    def captures(self) -> bool:
        """Whether any phase may run graphs."""
        return (self.decode, self.mixed) != ("none", "none")

    def __str__(self) -> str:
        return f"decode={self.decode},mixed={self.mixed}"


def parse_plan(text: str) -> GraphPlan[Wanted]:
    """Read ``--graph-mode``.

    ``auto``, one executor for both phases, ``decode=full,mixed=breakable`` (a phase left out is
    ``auto``), or a mode name of vLLM's (:data:`ALIASES`). Case does not matter.

    Raises:
        ConfigError: Anything else.
    """
    lowered = text.strip().lower()
    lowered = ALIASES.get(lowered, lowered)
    choices = ("auto", *EXECUTORS)
    if lowered in choices:
        return GraphPlan(cast(Wanted, lowered), cast(Wanted, lowered))
    found: dict[str, Wanted] = {}
    for part in lowered.split(","):
        phase, equals, executor = (each.strip() for each in part.partition("="))
        if not equals or phase not in PHASES or executor not in choices or phase in found:
            raise ConfigError(
                f"graph_mode={text!r}: expected one of {', '.join(choices)}, or "
                f"decode=EXECUTOR,mixed=EXECUTOR, or one of vLLM's "
                f"{', '.join(each.upper() for each in ALIASES)}"
            )
        found[phase] = cast(Wanted, executor)
    return GraphPlan(found.get("decode", "auto"), found.get("mixed", "auto"))


def support_of(
    uses: Iterable[tuple[Op, Implementation]], platform: Platform
) -> dict[str, GraphSupport]:
    """Graph support of the break ops among ``uses``, by ``"op (implementation)"``."""
    return {
        f"{op.name} ({each.name})": each.graph_support_on(platform)
        for op, each in uses
        if op.break_op
    }


def outside_of_graphs(uses: Iterable[tuple[Op, Implementation]], platform: Platform) -> str | None:
    """What no executor can capture: an op that segments would have to hold, and never may. None:
    there is none."""
    for op, each in uses:
        if not op.break_op and each.graph_support_on(platform) == "never":
            return f"{op.name} ({each.name}) can never run inside a graph of {platform.name}"
    return None


def resolve(
    plan: GraphPlan[Wanted],
    platform: Platform,
    support: Mapping[Phase, Mapping[str, GraphSupport]],
    *,
    refused: Mapping[Phase, str | None] = MappingProxyType({}),
    query_len: int = 1,
    compiler_reason: str | None = None,
    verbose: bool = True,
) -> GraphPlan[Executor]:
    """Settle the plan for a platform and a model's break ops; log each downgrade once.

    Args:
        plan: What was asked for.
        platform: Where it runs.
        support: Of each break op that steps of a phase call, see :func:`support_of`.
        refused: Why steps of a phase cannot be captured at all, see :func:`outside_of_graphs`.
        query_len: The most new tokens of a request in a decode step.
        compiler_reason: Why nothing can be compiled here; None: it can.
        verbose: Log the downgrades.
    """
    downgrades: list[Downgrade] = []
    result: dict[Phase, Executor] = {}
    for phase in PHASES:
        wanted = plan.of(phase)
        if wanted == "auto":
            wanted = _automatic(phase) if platform.graphs_by_default else "none"
        executor: Executor = wanted
        while True:
            whole = None if executor == "none" else refused.get(phase)
            reason = whole or _obstacle(
                executor, phase, platform, support.get(phase, {}), query_len, compiler_reason
            )
            if reason is None:
                break
            lower = "none" if whole or not platform.has_graphs else FALLBACK[executor]
            downgrades.append(Downgrade(phase, executor, lower, reason))
            executor = lower
        result[phase] = executor
    if verbose:
        for each in downgrades:
            logger.warning("%s", each)
    return GraphPlan(result["decode"], result["mixed"], tuple(downgrades))


def _automatic(phase: Phase) -> Executor:
    return "full" if phase == "decode" else "breakable"


def _obstacle(
    executor: Executor,
    phase: Phase,
    platform: Platform,
    support: Mapping[str, GraphSupport],
    query_len: int,
    compiler_reason: str | None,
) -> str | None:
    """Why ``executor`` cannot run ``phase``; None: it can."""
    if executor == "none":
        return None
    if not platform.has_graphs:
        return f"platform {platform.name} has no device graphs"
    if executor == "compiled" and compiler_reason is not None:
        return compiler_reason
    if executor != "full":
        return None
    for name, level in support.items():
        if level == "always":
            continue
        if level == "never":
            return f"{name} can never run inside a graph"
        if phase == "mixed":
            return f"{name} can run inside a graph only in decode steps ({level})"
        if level == "single_token_decode" and query_len > 1:
            return f"{name} can run inside a graph only with one new token a request"
    return None
