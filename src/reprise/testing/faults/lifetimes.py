"""Faults in what outlives a step otherwise than kept rows do: windows and states."""

from __future__ import annotations

from typing import Any

import torch

from reprise.ops.registry import Op
from reprise.platforms import Platform
from reprise.testing.faults.base import BrokenInGraphs

TOO_MANY = 16
"""Tokens by which a window is too wide: a block or more."""


class WrongWindow(BrokenInGraphs):
    name = "wrong_window"
    summary = "attention sees what has left its window; where there is none, a few tokens alone"

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if "sliding_window" not in op.arguments:
            return "the op has no window"
        return super().inexpressible(op, executor, platform)

    def broken(self, named: dict[str, Any]) -> Any:
        window = named["sliding_window"]
        return self.proceed({**named, "sliding_window": window + TOO_MANY})


class StateFault(BrokenInGraphs):
    """Of an op that rewrites a ``state`` [S, ...] at ``slots`` [R]; ``fresh`` [R] ones begin."""

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if not {"state", "slots", "fresh"} <= set(op.arguments):
            return "the op has no state"
        return super().inexpressible(op, executor, platform)


class StateNotZeroed(StateFault):
    name = "state_not_zeroed"
    summary = "a fresh request goes on from what its slot was left with"
    shows_in = "mixed"

    def broken(self, named: dict[str, Any]) -> Any:
        return self.proceed({**named, "fresh": torch.zeros_like(named["fresh"])})


class StateTwice(StateFault):
    name = "state_twice"
    summary = "a step updates each state twice"

    def broken(self, named: dict[str, Any]) -> Any:
        self.proceed(named)
        return self.proceed(named)


class StateOfAnother(StateFault):
    name = "state_of_another"
    summary = "each request has the state of the one before it"

    def broken(self, named: dict[str, Any]) -> Any:
        return self.proceed({**named, "slots": named["slots"].roll(1)})
