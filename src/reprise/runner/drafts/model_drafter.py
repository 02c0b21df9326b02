"""Drafts that a model computes, with graphs of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from reprise.cache import CacheLayout
from reprise.graphs import Buckets, Computation, GraphPlan, GraphRunner, VerifyMode
from reprise.graphs.plan import Wanted
from reprise.ops.step import NEXT
from reprise.runner.arena import to_device
from reprise.runner.buffers import StepBuffers
from reprise.runner.drafts.chain import ChainInputs, DraftChain
from reprise.runner.drafts.draft_model import DraftModel
from reprise.runner.drafts.prefill import DraftPrefill
from reprise.runner.drafts.synthetic import SyntheticDrafter
from reprise.runner.forward_pass import ForwardPass
from reprise.shape import StepShape
from reprise.speculation import Speculation
from reprise.step import Step

logger = logging.getLogger(__name__)

PREFILL, CHAIN = "draft prefill", "draft chain"
"""What its graphs are called."""


@dataclass(frozen=True)
class GraphOptions:
    """How the graphs of an engine are made, whoever owns them."""

    plan: GraphPlan[Wanted]
    buckets: Buckets
    max_requests: int
    verify: VerifyMode

    def runner(
        self, computation: Computation, buffers: StepBuffers, width: int, owner: str = ""
    ) -> GraphRunner:
        """Of a computation whose decode steps have ``width`` tokens a request."""
        return GraphRunner(
            computation, buffers.platform, self.plan, self.buckets, self.max_requests,
            verify=self.verify, query_lens=(width,), owner=owner,
        )  # fmt: skip


class ModelDrafter:
    """Drafts with a model, on the device alone: a prefill over what the target has computed, then a
    chain of passes, one for each further draft.

    Args:
        speculation: How many tokens.
        draft: The model.
        buffers: Of the target's steps.
        target: The target's pass.
        max_tokens: Most tokens in a step.
        max_model_len: Most tokens of a request.
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
    ) -> None:
        count = self._count = speculation.num_tokens
        self.draft, self._buffers = draft, buffers
        self._speculation = speculation
        self._synthetic: SyntheticDrafter | None = None
        """Has drafts count by chance, for measurements."""
        if speculation.synthetic_acceptance is not None:
            self._synthetic = SyntheticDrafter(speculation, buffers.rows, buffers.platform)
        self.inputs = ChainInputs(buffers, max_model_len, count, draft)
        self.prefill = DraftPrefill(draft, buffers, target, max_tokens)
        self.chain = DraftChain(draft, count, self.inputs, target)
        self.owners: dict[str, GraphRunner] = {}
        self._last: list[int] = []
        """Rows of the last chain, if nothing of them has changed."""
        logger.info(
            "drafts: %d tokens a step by %s, %.2f GiB of weights of its own",
            count, speculation.method,
            sum(each.nbytes for each in draft.parameters()) / 2**30,
        )  # fmt: skip

    def plan_graphs(self, options: GraphOptions) -> None:
        """Make what runs the passes, with graphs as the engine's options say."""
        if self._speculation.eager:
            options = replace(options, plan=GraphPlan("none", "none"))
        prefill = options
        if not self.draft.shifted:  # the tokens of decode steps are met in the chain
            prefill = replace(options, plan=GraphPlan("none", options.plan.mixed))
        # Drafts are compared token by token: code that is right within a bound may draw others.
        decode: Wanted = "breakable" if options.plan.decode == "compiled" else options.plan.decode
        if decode != options.plan.decode:
            logger.info("graph plan: %s: compiled -> breakable (drafts must be equal)", CHAIN)
        chain = replace(options, plan=GraphPlan(decode, "none"))
        width = 1 + self._buffers.rows.num_drafts
        chained = chain.runner(self.chain, self._buffers, self.inputs.width, CHAIN)
        if not chained.exact:
            logger.warning("graph plan: %s: %s -> none (ops are inexact)", CHAIN, decode)
            chain = replace(chain, plan=GraphPlan("none", "none"))
            chained = chain.runner(self.chain, self._buffers, self.inputs.width, CHAIN)
        self.owners = {
            PREFILL: prefill.runner(self.prefill, self._buffers, width, PREFILL),
            CHAIN: chained,
        }

    def use_cache(self, layout: CacheLayout, max_model_len: int) -> None:
        """The pools have these sizes; the target's pass knows already."""
        self.chain.use_cache(layout, max_model_len)

    def forward_passes(self, tokens: int, requests: int) -> list[Callable[[], Tensor]]:
        """Its passes at a size, for kernels to be compiled and memory to be measured."""
        width = 1 + self._buffers.rows.num_drafts
        steps: list[tuple[DraftPrefill | DraftChain, StepShape]] = [
            (self.prefill, StepShape.mixed(tokens, requests))
        ]
        if self.draft.shifted:
            steps.append((self.prefill, StepShape.decode(requests, width)))
        steps.append((self.chain, self.chain_shape(requests)))

        def run(computation: DraftPrefill | DraftChain, shape: StepShape) -> Tensor:
            computation.pad(shape.empty, shape)
            return computation.forward(shape)

        return [partial(run, *each) for each in steps]

    def chain_shape(self, requests: int) -> StepShape:
        """Of a chain for so many requests."""
        return StepShape.decode(requests, self.inputs.width)

    # ---- steps ---------------------------------------------------------------------------

    def admit(self, step: Step) -> None:
        if step.admitted:
            self._last = []
            # Further than a row's blocks reach nothing is drafted, whatever lay there before.
            rows = np.array([each.row for each in step.admitted], dtype=np.int64)
            self._buffers.rows.clear_tables(rows)

    def judge(self, step: Step, rows: Tensor, first_draw: Tensor, drawn: Tensor) -> None:
        if self._synthetic is not None:
            self._synthetic.judge(step, rows, first_draw, drawn)

    def propose(self, step: Step, rows: Tensor, emitted: Tensor) -> None:
        inputs, shifted = self.inputs, self.draft.shifted
        requests, decodes = len(step.rows), step.num_decodes == len(step.rows)
        drawing, number = list(step.rows), None
        if not all(step.samples):
            which = [n for n, samples in enumerate(step.samples) if samples]
            drawing = [step.rows[n] for n in which]
            number = to_device(np.array(which, dtype=np.int64), self._buffers.platform)
        last = inputs.last_tokens(requests)
        hidden = None
        if shifted:
            self.prefill.shift(step.num_tokens, last, self._behind(step, rows))
        if shifted or not decodes:
            hidden = self._run(PREFILL, step.shape)
        if not drawing:
            return
        if number is not None:
            last = last.index_select(0, number)
        shape = self.chain_shape(len(drawing))
        rows = inputs.follow(
            np.array(drawing, dtype=np.int64), number, last, self.owners[CHAIN].padded(shape),
            same=drawing == self._last and not any(step.edits), greedy=self._speculation.greedy,
        )  # fmt: skip
        self._last = drawing
        if shifted:
            assert hidden is not None
            inputs.hidden[: len(drawing)].copy_(hidden.index_select(0, last))
        drafts = self._run(CHAIN, shape)
        ahead = self._buffers.rows.numbers[NEXT + 1 : NEXT + 1 + self._count]
        ahead.index_copy_(1, rows, drafts)

    def _behind(self, step: Step, rows: Tensor) -> Tensor:
        """[R] int64: the token behind the last one of each request that counts. Behind a chunk that
        is not its prompt's last one the host knows it."""
        newest = self._buffers.rows.numbers[NEXT].index_select(0, rows)
        if all(step.samples):
            return newest
        known = np.full(len(step.rows), -1, dtype=np.int64)
        for number, samples in enumerate(step.samples):
            if not samples:
                admission = self._buffers.rows.admitted[step.rows[number]]
                assert admission is not None, "a row computes known tokens of its admission"
                end = self._buffers.starts(number) + step.counts[number]
                known[number] = admission.token_ids[end]
        told = to_device(known, self._buffers.platform)
        return torch.where(told >= 0, told, newest)

    def _run(self, owner: str, shape: StepShape) -> Tensor:
        runner = self.owners[owner]
        runner.caches_changed()  # by the others
        return runner.run(shape)

    def forget(self) -> None:
        """A step failed half-way, or inputs were overwritten."""
        self._last = []
        self.inputs.forget()

    def memory(self) -> dict[str, Tensor]:
        return {**self.inputs.arrays(), **self.prefill.arrays()}
