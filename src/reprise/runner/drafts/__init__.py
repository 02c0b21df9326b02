"""Drafters: where the tokens come from that a step verifies beside the newest ones."""

from __future__ import annotations

from reprise.platforms import Platform
from reprise.runner.drafts.chain import DraftChain
from reprise.runner.drafts.contract import Drafter
from reprise.runner.drafts.load import load_draft
from reprise.runner.drafts.model_drafter import CHAIN, PREFILL, GraphOptions, ModelDrafter
from reprise.runner.drafts.ngram import NgramDrafter
from reprise.runner.drafts.prefill import DraftPrefill
from reprise.runner.drafts.synthetic import SyntheticDrafter
from reprise.runner.drafts.withheld import Withheld
from reprise.runner.rows import Rows
from reprise.speculation import Speculation

__all__ = [
    "CHAIN",
    "PREFILL",
    "DraftChain",
    "DraftPrefill",
    "Drafter",
    "GraphOptions",
    "ModelDrafter",
    "Withheld",
    "load_draft",
    "make_drafter",
]


def make_drafter(
    speculation: Speculation, rows: Rows, max_model_len: int, platform: Platform
) -> Drafter:
    """What drafts as ``speculation`` says, if that takes no model."""
    if speculation.synthetic_acceptance is not None:
        return SyntheticDrafter(speculation, rows, platform)
    return NgramDrafter(speculation, rows, max_model_len, platform)
