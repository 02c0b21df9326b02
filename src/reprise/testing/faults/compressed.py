"""Faults in rows that stand for several tokens: how they are made, found, and what goes by ids."""

from __future__ import annotations

from typing import Any

import torch

from reprise.testing.faults.base import BrokenInGraphs, StaleArgument

AT = 2
"""Place of a token in its row."""


class CompressorFault(BrokenInGraphs):
    """Of an op that keeps what each token is, at ``state_slots`` [T], until its row is whole and is
    stored at ``slots`` [T]; ``bias`` [r, C] is by a token's place in its row of r."""

    needs = "compressed"
    reads = frozenset({"state_slots", "bias", "slots"})
    without = "the op compresses nothing"


class RowNotMade(CompressorFault):
    name = "row_not_made"
    summary = "the token that completes a row makes none"

    def broken(self, named: dict[str, Any]) -> Any:
        return self.proceed({**named, "slots": torch.zeros_like(named["slots"])})


class StaleRingRow(CompressorFault):
    name = "stale_ring_row"
    summary = "rows are made of what other tokens left where these should be"

    def broken(self, named: dict[str, Any]) -> Any:
        return self.proceed({**named, "state_slots": torch.zeros_like(named["state_slots"])})


class WrongResidue(CompressorFault):
    name = "wrong_residue"
    summary = "each token has the bias of the next place in a row"

    def broken(self, named: dict[str, Any]) -> Any:
        return self.proceed({**named, "bias": named["bias"].roll(-1, 0)})


class WrongAtOneResidue(CompressorFault):
    name = "wrong_at_one_residue"
    summary = "what a token leaves is lost, if it is at one certain place in its row"

    def broken(self, named: dict[str, Any]) -> Any:
        slots, every = named["state_slots"], len(named["bias"])
        there = named["positions"] % every == AT
        return self.proceed({**named, "state_slots": torch.where(there, 0, slots)})


class IndexOfAnother(BrokenInGraphs):
    """Of an op that chooses rows by their ``keys`` in blocks of ``block_tables`` [R, M]."""

    name = "index_of_another"
    summary = "each request's rows are chosen by the keys of the one before it"
    needs = "compressed"
    reads = frozenset({"weights", "keys", "block_tables"})
    without = "the op has no index"

    def broken(self, named: dict[str, Any]) -> Any:
        return self.proceed({**named, "block_tables": named["block_tables"].roll(1, 0)})


class StaleHash(StaleArgument):
    """Of an op that is told by token ids which experts each row goes to, ``chosen`` [T, K]."""

    name = "stale_hash"
    summary = "rows are sent to the experts of the captured step's token ids"
    needs = "compressed"
    reads = frozenset({"logits", "chosen"})
    without = "nothing goes by token ids"
    argument = "chosen"

    def run(self, named: dict[str, Any]) -> Any:
        return self.proceed(named) if named["chosen"] is None else super().run(named)
