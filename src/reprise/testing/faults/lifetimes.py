"""Faults in what outlives a step otherwise than kept rows do: windows and states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from reprise.ops.registry import Op
from reprise.platforms import Platform
from reprise.testing.faults.base import BrokenInGraphs, StaleArgument

TOO_MANY = 16
"""Tokens by which a window is too wide: a block or more."""
DRAFTS = 3
"""Of an engine in which faults of drafts can do harm."""


class WrongWindow(BrokenInGraphs):
    name = "wrong_window"
    summary = "attention sees what has left its window; where there is none, a few tokens alone"
    reads = frozenset({"sliding_window"})
    without = "the op has no window"

    def broken(self, named: dict[str, Any]) -> Any:
        window = named["sliding_window"]
        return self.proceed({**named, "sliding_window": window + TOO_MANY})


class StateFault(BrokenInGraphs):
    """Of an op that rewrites a ``state`` [S, ...] at ``slots`` [R]; ``fresh`` [R] ones begin."""

    needs = "states"
    reads = frozenset({"state", "slots", "fresh"})
    without = "the op has no state"


class StateNotZeroed(StateFault):
    name = "state_not_zeroed"
    summary = "a fresh request goes on from what its slot was left with"
    shows_in = "mixed"

    def broken(self, named: dict[str, Any]) -> Any:
        return self.proceed({**named, "fresh": torch.zeros_like(named["fresh"])})


class StateForgotten(StateFault):
    name = "state_forgotten"
    summary = "each step begins from nothing, as if nothing came before its tokens"

    def broken(self, named: dict[str, Any]) -> Any:
        return self.proceed({**named, "fresh": torch.ones_like(named["fresh"])})


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


class DraftFault(StateFault):
    """Of one that is told how many tokens of each request's last step count, ``accepted`` [R]."""

    engine_options: ClassVar[Mapping[str, Any]] = {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": DRAFTS}
    }
    reads = StateFault.reads | {"accepted"}
    without = "the op is told nothing of drafts"


class StateOfRejectedDrafts(DraftFault):
    name = "state_of_rejected_drafts"
    summary = "a state goes on from all drafts of the last step, those too that do not count"

    def broken(self, named: dict[str, Any]) -> Any:
        accepted = named["accepted"]
        every = torch.where(accepted > 0, 1 + DRAFTS, accepted).to(accepted.dtype)
        return self.proceed({**named, "accepted": every})


class StaleAccepted(StaleArgument, DraftFault):
    name = "stale_accepted"
    summary = "of a request's last step so many tokens count as did in the captured step"
    argument = "accepted"


class ChunkReplaysNothing(DraftFault):
    name = "chunk_replays_nothing"
    summary = "a chunk goes on from a copied state without the drafts that it has beside it"
    shows_in = "mixed"
    reads = DraftFault.reads | {"known"}

    def broken(self, named: dict[str, Any]) -> Any:
        accepted = torch.where(named["known"] > 0, 0, named["accepted"])
        return self.proceed({**named, "accepted": accepted.to(named["accepted"].dtype)})


class StateCommittedTwice(DraftFault):
    name = "state_committed_twice"
    summary = "a state is carried over the tokens that count of the last step, and once more"

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if len(op.state) < 2:
            return "the op replays nothing"
        return super().inexpressible(op, executor, platform)

    def broken(self, named: dict[str, Any]) -> Any:
        replayed = {name: named[name] for name in self.op.state if name != "state"}
        before = {name: each.clone() for name, each in replayed.items()}
        self.proceed(named)
        for name, each in replayed.items():
            each.copy_(before[name])
        return self.proceed(named)
