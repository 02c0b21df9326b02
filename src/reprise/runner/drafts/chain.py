"""The passes of a draft model behind a step: one token after the other, as one graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reprise import ops
from reprise.cache import Batch, CacheLayout, Table
from reprise.graphs.contract import Probe
from reprise.graphs.kinds import Facts, Kind
from reprise.graphs.regions import Region
from reprise.layers import routes
from reprise.runner.drafts.chain_inputs import ChainInputs
from reprise.runner.drafts.draft_model import DraftModel
from reprise.runner.forward_pass import ForwardPass
from reprise.runner.probes import ProbeMaker
from reprise.runner.written_rows import WrittenRows
from reprise.shape import StepShape


class DraftChain:
    """All passes of a draft model behind a step
    (:class:`reprise.graphs.contract.Computation`): drafts follow each other on the device, and one
    graph has them all.

    A pass reads its positions, lengths and slots from static inputs that have those of all passes,
    so that nothing is counted up in the graph, of padding least of all.

    Args:
        draft: What drafts.
        inputs: Where the requests stand.
        target: Lists the memory.
    """

    def __init__(self, draft: DraftModel, inputs: ChainInputs, target: ForwardPass) -> None:
        self.ops = target.ops
        self.model: Callable[..., Any] = draft
        self.facts: Facts = inputs.known.facts
        self._draft, self._inputs, self._target = draft, inputs, target
        self._own_caches = tuple(draft.caches().values())
        device, dtype = inputs.platform.device, next(draft.parameters()).dtype
        most = inputs.max_requests
        count = max(inputs.widths.values())
        self._drafts = torch.zeros(count, most, dtype=torch.int64, device=device)
        self._logits = torch.zeros(most, draft.vocab_size, dtype=dtype, device=device)
        self._behind = torch.arange(
            inputs.width - 1, -1, -1, dtype=torch.int32, device=device
        ).unsqueeze(1)
        self.compiled = False
        """Its passes may be: then what each computes can be compared apart from what it draws."""
        self._given = torch.full_like(self._drafts, -1)
        """[K, R]: what to go on from; -1: from what is drawn."""
        self._drawn = torch.zeros_like(self._drafts)
        self._passes = torch.zeros(count, 0, draft.hidden_size, dtype=dtype, device=device)
        """[K, R, D]: the hidden states behind which each draft is drawn, where anybody reads it."""
        self._one_known = torch.ones(most, dtype=torch.int32, device=device)
        self._none_accepted = torch.zeros_like(self._one_known)
        self._probes: ProbeMaker | None = None

    def use_cache(self, layout: CacheLayout, max_model_len: int) -> None:
        """See :meth:`ForwardPass.use_cache`, which comes first."""
        self._inputs.layout = self._inputs.known.layout = layout
        self._probes = ProbeMaker(
            self._inputs,
            self._target.found_caches,
            vocab_size=self._draft.vocab_size,
            max_model_len=max_model_len,
            routed=routes(self._draft),
            chained=self._draft.keeps_states,
        )

    # ---- the passes ----------------------------------------------------------------------

    def forward(self, shape: StepShape, model: Callable[..., Any] | None = None) -> Tensor:
        """[K, R]: the drafts of each request, -1 where the request has no place for the token that
        one is drawn behind."""
        inputs, requests = self._inputs, shape.num_requests
        run = model or self.model
        passes = _Passes(inputs, shape, self._behind)
        shifted, first = self._draft.shifted, -1
        parameters = {name: each[:requests] for name, each in inputs.parameters.items()}
        number = parameters.pop("number")
        logits = self._logits[:requests]
        if shifted:
            hidden = inputs.hidden[:requests]
        elif self._draft.keeps_states:
            self._copy_states(requests)
            passes.know(self._one_known[:requests])
            hidden, first = run(passes.newest(), None), 0
            passes.accept(self._none_accepted[:requests])
        else:
            # The last token that the target has computed, and the newest one.
            pair = run(passes.first_two(), None)
            hidden, first = pair.view(requests, 2, -1)[:, 1].contiguous(), 1
        count = inputs.widths[shape.query_len]
        for draft in range(count):
            raw = self._draft.logits(hidden, logits).float()
            drawn = ops.sample(raw, *parameters.values(), number + draft)
            # In trials ops give memory of any content, and the next pass looks it up. Kernels of
            # torch start in order: a pass begins when the last one has ended, whose keys it reads.
            drawn = self._draft.token_ids(drawn.clamp(0, self._draft.vocab_size - 1))
            behind = first + draft
            there = passes.there(behind)
            if self.compiled:
                read = torch.where(there.unsqueeze(1), hidden, 0)
                self._passes[draft, :requests].copy_(read)
                self._drawn[draft, :requests].copy_(drawn)
                given = self._given[draft, :requests]
                drawn = torch.where(given >= 0, given, drawn)
            self._drafts[draft, :requests] = torch.where(there, drawn, -1)
            if draft + 1 < count:
                hidden = run(passes.one(behind + 1, drawn), hidden if shifted else None)
        return self._drafts[:count, :requests]

    def compare_passes(self) -> None:
        """Have passes compared one by one: they will be compiled, which rounds in other places."""
        self.compiled = True
        count, most = self._drafts.shape
        self._passes = self._passes.new_zeros(count, most, self._passes.shape[2])

    @contextlib.contextmanager
    def follow(self, shape: StepShape) -> Iterator[None]:
        """See :class:`reprise.graphs.contract.Computation`."""
        self._given.copy_(self._drawn)
        try:
            yield
        finally:
            self._given.fill_(-1)

    def _copy_states(self, requests: int) -> None:
        """What is drafted leaves no trace in the requests' states: it goes on from copies."""
        inputs = self._inputs
        for cache in self._draft.caches().values():
            if cache.lifetime.rewritten:
                own = inputs.block_tables[cache.table, :requests, 0]
                copy = inputs.states(cache.table, requests).long()
                for each in cache.tensors.values():
                    each.index_copy_(0, copy, each.index_select(0, own))

    def pad(self, live: StepShape, bucket: StepShape) -> None:
        self._inputs.fill_padding(live, bucket)

    def inputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        views = self._inputs.views(shape.num_tokens, shape.num_requests)
        if not self._draft.keeps_states:  # nothing else reads it
            del views["accepted"]
        return views

    def outputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        count, requests = self._inputs.widths[shape.query_len], shape.num_requests
        found = {"drafts": self._drafts[:count, :requests]}
        if self.compiled:
            found["draft passes"] = self._passes[:count, :requests]
        return found

    def memory(self) -> Mapping[str, Region]:
        return self._target.memory()

    def arrays(self) -> dict[str, Tensor]:
        """All device memory of this that steps read, by name."""
        return {
            "draft chain's distances": self._behind,
            "draft chain's given drafts": self._given,
            "draft chain's known tokens": self._one_known,
            "draft chain's accepted tokens": self._none_accepted,
        }

    def mend(self, weights: Sequence[str]) -> None:
        self._target.mend(weights)

    def kind(self, live: StepShape, bucket: StepShape, exact: bool = False) -> Kind | None:
        return self._inputs.kind(bucket, exact=exact)

    def probes(self, bucket: StepShape, anchor: bool) -> Sequence[Probe]:
        assert self._probes is not None, "use_cache comes first"
        return [
            self._drawing(each, number)
            for number, each in enumerate(self._probes.probes(bucket, anchor))
        ]

    def probe(self, bucket: StepShape, context: int) -> Probe:
        """See :meth:`ForwardPass.probe`."""
        assert self._probes is not None, "use_cache comes first"
        return self._drawing(self._probes.probe(bucket, context), 0)

    def state(self, bucket: StepShape) -> WrittenRows:
        # Where one draft is drawn behind the prefill of a shifted model no pass follows.
        passes = not self._draft.shifted or self._inputs.widths[bucket.query_len] > 1
        own = self._own_caches if passes else ()
        return _ChainRows(*self._target.where_rows_are(), self._inputs, bucket, own)

    def _drawing(self, probe: Probe, seed: int) -> Probe:
        def fill() -> None:
            probe.fill()
            self._inputs.fill_draws(probe.live, seed)

        return replace(probe, fill=fill)


class _ChainRows(WrittenRows):
    def read_by_someone(self, key: str | None = None) -> Tensor | None:
        # Drafts for which there is no place are -1, whatever they were.
        return None if key is None else super().read_by_someone(key)


class _Passes:
    """The tokens of a chain, pass by pass."""

    def __init__(self, inputs: ChainInputs, shape: StepShape, behind: Tensor) -> None:
        self._inputs = inputs
        count, width = shape.num_requests, shape.query_len
        self._batch: Batch = inputs.batch(shape.num_tokens, count, width)
        self._count, self._width = count, width
        self._positions = self._batch.positions.view(count, width).T.contiguous()
        slots = inputs.slots[:, : shape.num_tokens].view(-1, count, width)
        self._slots = slots.movedim(2, 0).contiguous()
        """[W, L, R]"""
        ends = self._batch.seq_lens
        self._lengths = torch.where(ends > 0, ends - behind[-width:], 0)
        """[W, R]: tokens of each request up to each token of the chain."""
        kept = inputs.layout.tables[0].block_size
        self._there = self._slots[:, 0] >= kept
        """[W, R]: which tokens have a place."""

    def there(self, token: int) -> Tensor:
        """[R]: the token of each request has a place; -1: the one before all."""
        return self._there[token] if token >= 0 else self._lengths[-1] > 0

    def know(self, known: Tensor) -> None:
        """[R] int32, :attr:`Batch.known` of the passes from now on."""
        self._batch = replace(self._batch, known=known)

    def accept(self, accepted: Tensor) -> None:
        """[R] int32, :attr:`Batch.accepted` of the passes from now on."""
        self._batch = replace(self._batch, accepted=accepted)

    def newest(self) -> Batch:
        """The first token of each request."""
        return self.one(0, self._batch.token_ids[:: self._width].contiguous())

    def first_two(self) -> Batch:
        """The first two tokens of each request."""
        batch, count, width = self._batch, self._count, self._width
        return self._of(
            batch.token_ids.view(count, width)[:, :2].reshape(-1),
            self._positions[:2].T.reshape(-1),
            [each.T.reshape(-1) for each in self._slots[:2].unbind(1)],
            self._lengths[1],
            2,
        )

    def one(self, token: int, ids: Tensor) -> Batch:
        """One token of each request, which is ``ids`` [R]."""
        slots = self._slots[token].unbind(0)
        return self._of(ids, self._positions[token], slots, self._lengths[token], 1)

    def _of(
        self, ids: Tensor, positions: Tensor, slots: Sequence[Tensor], lengths: Tensor, each: int
    ) -> Batch:
        tables = tuple(
            Table(table.blocks, slot) for table, slot in zip(self._batch.tables, slots, strict=True)
        )
        begins = self._inputs.begins[each][: self._count + 1]
        return replace(
            self._batch, token_ids=ids, positions=positions, query_start_loc=begins,
            seq_lens=lengths, tables=tables, query_len=each,
        )  # fmt: skip
