"""Comparison of one replay with eager execution: results, and all memory that must stay alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reprise.errors import ConfigError, describe
from reprise.graphs.compare import Difference, copies, difference, differs, poison, poison_memory
from reprise.graphs.computation import Computation, State
from reprise.graphs.guard import Before, Change, Guard, Scope
from reprise.graphs.segments import SegmentedGraph
from reprise.graphs.shape import StepShape
from reprise.ops.registry import OpTable


@dataclass(frozen=True)
class VerifyMode:
    """When graphs are compared with eager execution."""

    startup: bool = True
    """At start-up, and the first live step of each kind that start-up has not met."""
    canary: int = 0
    """While serving, recompute one in this many replays of each graph; 0: none."""
    background: bool = False
    """As ``canary``, with numbers that follow from what a canary costs."""

    def __str__(self) -> str:
        if self.background:
            return "auto"
        if self.canary:
            return f"canary:{self.canary}"
        return "startup" if self.startup else "off"


def parse_verify(text: str) -> VerifyMode:
    """Read ``--graph-verify``: ``off``, ``startup``, ``auto``, or ``canary:N``; the last two
    include start-up.

    Raises:
        ConfigError: Anything else.
    """
    kind, colon, number = text.strip().lower().partition(":")
    if kind == "canary" and colon and number.isdigit() and int(number) > 0:
        return VerifyMode(canary=int(number))
    if kind in ("off", "startup", "auto") and not colon:
        return VerifyMode(startup=kind != "off", background=kind == "auto")
    raise ConfigError(
        f"graph_verify={text!r}: expected off, startup, auto, or canary:N, such as canary:100 "
        "to recompute one step in a hundred"
    )


@dataclass
class Verdict:
    """What a comparison found."""

    differences: list[Difference] = field(default_factory=list)
    """Results that are not those of eager execution."""
    changes: list[Change] = field(default_factory=list)
    """Memory that the replay changed and may not change."""
    error: str | None = None
    """Why there was nothing to compare."""
    ran: bool = True
    """There was a replay."""
    eager_seconds: float | None = None
    """None: not measured."""
    replay_seconds: float | None = None

    @property
    def right(self) -> bool:
        return not (self.differences or self.changes or self.error)

    @property
    def told(self) -> str:
        """In words; the first of each kind, and how many more."""
        parts = [] if self.error is None else [self.error]
        if self.differences:
            parts.append(str(self.differences[0]) + _more(self.differences))
        if self.changes:
            parts.append(f"it changed {self.changes[0]}{_more(self.changes)}, which is not its own")
        return "; ".join(parts)


def examine(
    computation: Computation,
    guard: Guard,
    graph: SegmentedGraph,
    bucket: StepShape,
    live: StepShape,
    model: Callable[..., Any],
    scope: Scope,
    *,
    bound: float | None,
    pool: Sequence[Tensor] = (),
    keep: bool,
    synchronize: Callable[[], None] | None = None,
) -> Verdict:
    """Compute the step that the static inputs hold, eagerly and then by replay, and compare.

    Eager execution comes first, on state that no replay has touched; what a step updates in place
    is put back between the two. Unwritten output shows since the two start from different garbage.
    Inputs and memory beside are as before afterwards, whatever the replay did to them.

    Args:
        computation: Its inputs hold a step, padded to the bucket.
        guard: Of its memory.
        graph: To be judged.
        bucket: What the graph was captured for.
        live: The real rows; only these are compared.
        model: What to compare with.
        scope: The memory to check.
        bound: None: compare bits; else see :func:`reprise.graphs.compare.differs`.
        pool: All memory of the graph's pool, to be overwritten before the replay, since a graph
            must not read what it has not written.
        keep: Afterwards outputs and state are those of the eager run; else the state is as before.
        synchronize: Waits for the device; both runs are timed with it.
    """
    step = StepMemory(computation, bucket, live)
    before = guard.before(scope)
    at_first = step.state()
    verdict = Verdict()
    try:
        for output in computation.outputs(bucket).values():
            output.zero_()
        verdict.eager_seconds = _timed(lambda: computation.forward(bucket, model), synchronize)
        step.meet_new_memory(at_first)
        expected, outputs = step.state(), copies(step.outputs)
        step.put(at_first)
        poison(computation.outputs(bucket).values())
        poison_memory(pool)
        try:
            verdict.replay_seconds = _timed(graph.replay, synchronize)
        except Exception as error:
            verdict.error = describe(error)
        got = step.state()
        step.put(at_first)
        _judge(verdict, step, guard, before, (expected, outputs), got, bound)
    except BaseException:
        guard.put_back(before)
        step.put(at_first)
        raise
    if not verdict.right:
        guard.put_back(before)
    if keep:
        step.put(expected)
        for name, output in step.outputs.items():
            output.copy_(outputs[name])
    if keep and verdict.right:
        guard.carry(before, step.written)
    return verdict


def _timed(run: Callable[[], Any], synchronize: Callable[[], None] | None) -> float | None:
    if synchronize is None:
        run()
        return None
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def memory_of_ops(table: OpTable) -> dict[str, Tensor]:
    """What the implementations in use keep from call to call, by name.

    A graph that leaves it in disorder spoils the steps after it, eager ones too: so it is compared
    like any result, and put back.
    """
    return {f"memory of ops ({key})": tensor for key, tensor in table.memory.items()}


Values = dict[str, Tensor]


class StepMemory:
    """What the step in the static inputs updates: rows of the caches, and the memory of ops."""

    def __init__(self, computation: Computation, bucket: StepShape, live: StepShape) -> None:
        self._computation = computation
        self._state: State = computation.state(bucket)
        self._tokens = live.num_tokens
        self._ops = memory_of_ops(computation.ops)
        self.written = self._state.written()
        self.outputs = computation.outputs(live)

    def state(self) -> Values:
        """Copies of all of it."""
        return {**self._state.read(), **copies(self._ops)}

    def put(self, values: Values) -> None:
        """Put back what :meth:`state` returned."""
        self._state.write({k: v for k, v in values.items() if k not in self._ops})
        for name, tensor in self._ops.items():
            tensor.copy_(values[name])

    def meet_new_memory(self, earlier: Values) -> None:
        """Ops that ran for the first time have made memory: it was then what it is now."""
        for name, tensor in memory_of_ops(self._computation.ops).items():
            if name not in self._ops:
                self._ops[name], earlier[name] = tensor, tensor.clone()

    def live(self, values: Values) -> Values:
        """Of what :meth:`state` returned, without the rows of padding: a tensor for each cache."""
        found: Values = {}
        for name, each in values.items():
            if name in self._ops:
                found[name] = each
            else:
                rows = each[:, : self._tokens]
                found.update(zip(self._state.names(name), rows, strict=True))
        return found

    def same(self, expected: Values, got: Values, bound: float | None) -> list[Tensor]:
        """For each tensor a boolean scalar on the device, true if it differs."""
        flags = []
        for name, each in expected.items():
            rows = slice(None) if name in self._ops else (slice(None), slice(self._tokens))
            flags.append(differs(each[rows], got[name][rows], bound))
        return flags


def _judge(
    verdict: Verdict,
    step: StepMemory,
    guard: Guard,
    before: Before,
    expected: tuple[Values, Values],
    got: Values,
    bound: float | None,
) -> None:
    """Compare what the replay left with what eager execution did; reads the device once.

    Args:
        verdict: Gets what is found.
        expected: Of eager execution, the state and the outputs.
        got: The state that the replay left; its outputs are where they belong.
    """
    state, outputs = expected
    live = step.outputs
    flags = [differs(each, live[name], bound) for name, each in outputs.items()]
    flags += step.same(state, got, bound)
    flags += guard.flags(before)
    if not torch.stack(flags).any().item():
        return
    pairs = [(name, each, live[name]) for name, each in outputs.items()]
    eager, replayed = step.live(state), step.live(got)
    pairs += [(name, each, replayed[name]) for name, each in eager.items()]
    if verdict.error is None:
        found = (difference(name, each, other, bound) for name, each, other in pairs)
        verdict.differences += [each for each in found if each is not None]
    verdict.changes += guard.changes(before)


def _more(found: Sequence[object]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
