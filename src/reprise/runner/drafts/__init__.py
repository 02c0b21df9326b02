"""Drafters: where the tokens come from that a step verifies beside the newest ones."""

from __future__ import annotations

from reprise.distributed import Agreement
from reprise.runner.buffers import StepBuffers
from reprise.runner.drafts.chain import DraftChain
from reprise.runner.drafts.contract import Drafter, GraphOptions
from reprise.runner.drafts.draft_model import DraftModel, caches_with, lookahead_of
from reprise.runner.drafts.load import load_draft
from reprise.runner.drafts.model_drafter import CHAIN, PREFILL, ModelDrafter
from reprise.runner.drafts.ngram import NgramDrafter
from reprise.runner.drafts.prefill import DraftPrefill
from reprise.runner.drafts.synthetic import SyntheticDrafter
from reprise.runner.drafts.withheld import Withheld
from reprise.runner.forward_pass import ForwardPass
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
    "caches_with",
    "load_draft",
    "lookahead_of",
    "make_drafter",
]


def make_drafter(
    speculation: Speculation,
    draft: DraftModel | None,
    buffers: StepBuffers,
    target: ForwardPass,
    *,
    max_tokens: int,
    max_model_len: int,
    in_step: Agreement | None = None,
) -> Drafter:
    """What drafts as ``speculation`` says.

    Args:
        speculation: The method and its options.
        draft: The model of :func:`load_draft`, if that takes one.
        buffers: Of the target's steps.
        target: The target's pass.
        max_tokens: Most tokens in a step.
        max_model_len: Most tokens of a request.
        in_step: See :class:`ModelDrafter`.
    """
    rows, platform = buffers.rows, buffers.platform
    if draft is not None:
        return ModelDrafter(
            speculation, draft, buffers, target,
            max_tokens=max_tokens, max_model_len=max_model_len, in_step=in_step,
        )  # fmt: skip
    if speculation.synthetic_acceptance is not None:
        return SyntheticDrafter(speculation, rows, platform)
    return NgramDrafter(speculation, rows, max_model_len, platform)
