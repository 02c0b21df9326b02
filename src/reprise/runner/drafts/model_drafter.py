"""Drafts that a model computes, with graphs of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from reprise.cache import CacheLayout
from reprise.distributed import Agreement
from reprise.graphs import GraphPlan, GraphRunner
from reprise.graphs.padding import compute_padding
from reprise.ops.step import NEXT
from reprise.runner.buffers import StepBuffers
from reprise.runner.drafts.chain import DraftChain
from reprise.runner.drafts.chain_inputs import ChainInputs, chain_width
from reprise.runner.drafts.contract import Drafter, GraphOptions
from reprise.runner.drafts.draft_model import DraftModel
from reprise.runner.drafts.prefill import DraftPrefill
from reprise.runner.drafts.synthetic import SyntheticDrafter
from reprise.runner.forward_pass import ForwardPass
from reprise.shape import StepShape
from reprise.speculation import Speculation, room_for
from reprise.step import Step

logger = logging.getLogger(__name__)

PREFILL, CHAIN = "draft prefill", "draft chain"
"""What its graphs are called."""


class ModelDrafter(Drafter):
    """Drafts with a model, on the device alone: a prefill over what the target has computed, then a
    chain of passes, one for each further draft.

    Args:
        speculation: How many tokens.
        draft: The model.
        buffers: Of the target's steps.
        target: The target's pass.
        max_tokens: Most tokens in a step.
        max_model_len: Most tokens of a request.
        in_step: How engines decide whose drafts' passes wait for this one's; None: none do.
    """

    def __init__(
        self,
        speculation: Speculation,
        draft: DraftModel,
        buffers: StepBuffers,
        target: ForwardPass,
        *,
        max_tokens: int,
        max_model_len: int,
        in_step: Agreement | None = None,
    ) -> None:
        self.draft, self._buffers = draft, buffers
        self._others, self.in_step = in_step, in_step is not None
        self._speculation = speculation
        self._synthetic: SyntheticDrafter | None = None
        """Has drafts count by chance, for measurements."""
        if speculation.synthetic_acceptance is not None:
            self._synthetic = SyntheticDrafter(speculation, buffers.rows, buffers.platform)
        counts = [each for each in speculation.levels if each]
        self.inputs = ChainInputs(buffers, max_model_len, counts, draft)
        self.prefill = DraftPrefill(draft, buffers, target, max_tokens)
        self.chain = DraftChain(draft, self.inputs, target)
        self.owners: dict[str, GraphRunner] = {}
        logger.info(
            "drafts: %d tokens a step by %s, %.2f GiB of weights of its own",
            speculation.num_tokens, speculation.method,
            sum(each.nbytes for each in draft.parameters()) / 2**30,
        )  # fmt: skip

    def plan_graphs(self, options: GraphOptions) -> None:
        if self._speculation.eager:
            options = replace(options, plan=GraphPlan("none", "none"))
        prefill, widths = options, self._step_widths
        if not self._prefills_decodes:
            widths = [each for each in widths if each == 1]
            if not widths:
                prefill = replace(options, plan=GraphPlan("none", options.plan.mixed))
        decode = options.plan.decode
        # Few layers with rows of padding are cheap; a graph of all passes takes the memory of many.
        buckets = options.buckets.sparse()
        chain = replace(options, plan=GraphPlan(decode, "none"), buckets=buckets)
        # Others that compute the same steps cannot wait for one that captures.
        lazy = not self.in_step
        chained = chain.runner(self.chain, self._buffers, self.inputs.widths, CHAIN, lazy=lazy)
        if not chained.exact:
            logger.warning("graph plan: %s: %s -> none (ops are inexact)", CHAIN, decode)
            chain = replace(chain, plan=GraphPlan("none", "none"))
            chained = chain.runner(self.chain, self._buffers, self.inputs.widths, CHAIN)
        if chained.plan.decode == "compiled":
            self.chain.compare_passes()
        self.owners = {
            PREFILL: prefill.runner(
                self.prefill, self._buffers, widths or self._step_widths, PREFILL, lazy=lazy
            ),
            CHAIN: chained,
        }

    def use_cache(self, layout: CacheLayout, max_model_len: int) -> None:
        self.chain.use_cache(layout, max_model_len)

    def forward_passes(self, tokens: int, requests: int) -> list[Callable[[], Tensor]]:
        steps: list[tuple[DraftPrefill | DraftChain, StepShape]] = [
            (self.prefill, StepShape.mixed(tokens, requests))
        ]
        for width in self._step_widths:
            if self._prefills_decodes or width == 1:
                steps.append((self.prefill, StepShape.decode(requests, width)))
        for width in self.inputs.widths:
            steps.append((self.chain, StepShape.decode(requests, width)))
        return [partial(compute_padding, *each) for each in steps]

    def example(self) -> None:
        one = StepShape.decode(1, 1)
        self.inputs.example_behind(self.prefill.ids(one, one))

    @property
    def _prefills_decodes(self) -> bool:
        """Else the tokens of decode steps are met in the chain, if there is one."""
        return self.draft.shifted or self.draft.keeps_states

    @property
    def _step_widths(self) -> list[int]:
        """Tokens of each request in the target's decode steps."""
        return [1 + room_for(each) for each in self._speculation.levels]

    # ---- steps ---------------------------------------------------------------------------

    def admit(self, step: Step) -> None:
        if step.admitted:
            # Further than a row's blocks reach nothing is drafted, whatever lay there before.
            rows = np.array([each.row for each in step.admitted], dtype=np.int64)
            self._buffers.rows.clear_tables(rows)

    def judge(self, step: Step, rows: Tensor, first_draw: Tensor, drawn: Tensor) -> None:
        if self._synthetic is not None:
            self._synthetic.judge(step, rows, first_draw, drawn)

    def propose(
        self,
        step: Step,
        rows: Tensor,
        emitted: Tensor,
        shape: StepShape,
        at_least: StepShape | None,
    ) -> None:
        inputs, shifted = self.inputs, self.draft.shifted
        count = self._speculation.num_tokens if step.drafting is None else step.drafting
        wanted = self._wanted(step)
        decodes = step.num_decodes == len(step.rows)
        # What is not drafted behind now may be later: the draft's caches must have it.
        met = shifted if count else not step.resting
        prefills = not decodes or (wanted and met) or self.draft.keeps_states
        chosen: Sequence[int] = ()
        if wanted and count:
            chosen = range(len(step.rows))
            if not decodes:
                chosen = [number for number, samples in enumerate(step.samples) if samples]
        width = chain_width(max(1, count), self.draft)
        whole: StepShape | None = None
        if self._others is None:
            at_least = None
        else:
            prefills, width, whole = self._agree(self._others, prefills, len(chosen), width)
        prefill, chain = self.owners[PREFILL], self.owners[CHAIN]
        chained = StepShape.decode(len(chosen), width)
        if not (prefills or chosen or whole):
            inputs.forget()  # the next chain is not the last one gone on: tables may be others
            return
        if step.rows:
            ids = self.prefill.ids(shape, prefill.padded(shape, at_least))
            if chosen or ids is not None:
                padded = chain.padded(chained, whole) if chosen else chained
                inputs.follow(step, chosen, ids, padded, width, greedy=self._speculation.greedy)
            else:
                inputs.forget()
        hidden = prefill.run(shape, at_least) if prefills else None
        if not chosen:
            if whole is not None:
                inputs.rest()
                chain.run(chained, whole)
            return
        rows_of, last, behind = inputs.of_chosen
        if shifted:
            assert hidden is not None
            torch.index_select(hidden, 0, last, out=behind)
        drafts = chain.run(chained, whole)
        ahead = self._buffers.rows.numbers[NEXT + 1 : NEXT + 1 + drafts.shape[0]]
        ahead.index_copy_(1, rows_of, drafts)

    @staticmethod
    def _agree(
        others: Agreement, prefills: bool, chosen: int, width: int
    ) -> tuple[bool, int, StepShape | None]:
        """What any engine computes, all do: whether there is a prefill, how many tokens each
        request has in the chain, and what that is padded to; None: there is none."""
        prefills = not others.all(not prefills)
        most = int(others.largest(chosen))
        if not most:
            return prefills, width, None
        width = int(others.largest(width if chosen else 0))
        return prefills, width, StepShape.decode(most, width)

    def _wanted(self, step: Step) -> bool:
        """Whether any request of the step wants drafts."""
        admitted = self._buffers.rows.admitted
        for row in step.rows:
            owner = admitted[row]
            if owner is None or owner.params.num_drafts != 0:
                return True
        return False

    def forget(self) -> None:
        self.inputs.forget()

    def memory(self) -> dict[str, Tensor]:
        return {**self.inputs.arrays(), **self.prefill.arrays(), **self.chain.arrays()}
