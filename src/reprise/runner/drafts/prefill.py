"""The pass of a draft model over what the target has computed, in the same layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reprise.graphs.contract import Probe
from reprise.graphs.kinds import Facts, Kind
from reprise.graphs.regions import Region
from reprise.runner.buffers import StepBuffers
from reprise.runner.drafts.draft_model import DraftModel
from reprise.runner.forward_pass import ForwardPass
from reprise.runner.written_rows import WrittenRows
from reprise.shape import StepShape


class DraftPrefill:
    """A draft model's pass over a step of the target
    (:class:`reprise.graphs.contract.Computation`): the same tokens of the same requests, at the
    same places in the caches of its own layers. A shifted model takes the id of the next token in
    each row, and the hidden states that the target has left.

    Args:
        draft: What drafts.
        buffers: The static inputs of the target's steps.
        target: The target's pass.
        max_tokens: Most tokens in a step.
    """

    def __init__(
        self, draft: DraftModel, buffers: StepBuffers, target: ForwardPass, max_tokens: int
    ) -> None:
        self.ops = target.ops
        self.model: Callable[..., Any] = draft
        self.facts: Facts = target.facts
        self._draft, self._buffers, self._target = draft, buffers, target
        self._own_caches = tuple(draft.caches().values())
        device, most = buffers.platform.device, max(max_tokens, buffers.max_tokens)
        dtype = next(draft.parameters()).dtype
        self._hidden = torch.zeros(most, draft.hidden_size, dtype=dtype, device=device)
        self._ids = torch.zeros(most * draft.shifted, dtype=torch.int64, device=device)
        self._padded: tuple[StepShape, StepShape] | None = None
        """The step whose ids are there, and what they were padded to."""

    def ids(self, live: StepShape, bucket: StepShape) -> Tensor | None:
        """[T] int64, to be written for a step and its padding: the id of the token behind each;
        None: the model takes the step's own."""
        if not self._draft.shifted:
            return None
        self._padded = live, bucket
        return self._ids[: bucket.num_tokens]

    follow = None
    """See :class:`reprise.graphs.contract.Computation`."""

    def forward(self, shape: StepShape, model: Callable[..., Any] | None = None) -> Tensor:
        """[T, D]"""
        batch = self._buffers.batch(shape.num_tokens, shape.num_requests, shape.query_len)
        taps = None
        if self._draft.shifted:
            batch = replace(batch, token_ids=self._ids[: shape.num_tokens])
            taps = self._draft.prepare(self._target.taps(shape))
        hidden = (model or self.model)(batch, taps)
        return self._hidden[: shape.num_tokens].copy_(hidden)

    def pad(self, live: StepShape, bucket: StepShape) -> None:
        self._target.pad(live, bucket)
        if self._padded == (live, bucket):
            return
        self._ids[live.num_tokens : bucket.num_tokens].zero_()

    def inputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        known = self._target.inputs(shape)
        if not self._draft.shifted:
            return known
        own = {"input_ids": self._ids[: shape.num_tokens], "taps": self._target.taps(shape)}
        return {**known, **own}

    def outputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        return {"draft hidden": self._hidden[: shape.num_tokens]}

    def memory(self) -> Mapping[str, Region]:
        return self._target.memory()

    def mend(self, weights: Sequence[str]) -> None:
        self._target.mend(weights)

    def kind(self, live: StepShape, bucket: StepShape, exact: bool = False) -> Kind | None:
        return self._target.kind(live, bucket, exact)

    def probes(self, bucket: StepShape, anchor: bool) -> Sequence[Probe]:
        return [
            self._shifted(each, number)
            for number, each in enumerate(self._target.probes(bucket, anchor))
        ]

    def probe(self, bucket: StepShape, context: int) -> Probe:
        """See :meth:`ForwardPass.probe`."""
        return self._shifted(self._target.probe(bucket, context), 0)

    def state(self, bucket: StepShape) -> WrittenRows:
        return WrittenRows(*self._target.where_rows_are(), self._buffers, bucket, self._own_caches)

    def arrays(self) -> dict[str, Tensor]:
        """All device memory of this that steps read, by name."""
        return {"draft prefill's ids": self._ids} if self._draft.shifted else {}

    def _shifted(self, probe: Probe, seed: int) -> Probe:
        if not self._draft.shifted:
            return probe
        taps = self._target.taps(probe.live)

        def fill() -> None:
            probe.fill()
            tokens = probe.live.num_tokens
            self._padded = None
            self._ids.zero_()
            self._ids[:tokens].copy_(self._buffers.input_ids.device[:tokens].roll(-1))
            generator = torch.Generator(device=taps.device).manual_seed(seed)
            taps.copy_(
                torch.randn(
                    taps.shape, generator=generator, dtype=torch.float32, device=taps.device
                )
            )

        return replace(probe, fill=fill)
