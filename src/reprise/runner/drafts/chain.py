"""The passes of a draft model behind a step: one token after the other, as one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.cache import Batch, CacheLayout, Table
from reprise.graphs.contract import Probe
from reprise.graphs.kinds import Facts, Kind
from reprise.graphs.regions import Region
from reprise.layers import routes
from reprise.ops.step import ACCEPTED, COMPUTED
from reprise.runner.arena import Ints, to_device
from reprise.runner.buffers import StepBuffers
from reprise.runner.drafts.draft_model import DraftModel
from reprise.runner.forward_pass import ForwardPass
from reprise.runner.probes import ProbeMaker
from reprise.runner.written_rows import WrittenRows
from reprise.shape import StepShape

_PARAMETERS = {
    "temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32,
    "min_p": torch.float32, "seed": torch.int64, "number": torch.int64,
}  # fmt: skip
"""Of the draws of each request, in the order of ``ops.sample``; ``number``: of the first one."""


def chain_width(count: int, shifted: bool) -> int:
    """Tokens of each request that a chain of ``count`` drafts computes, in a row.

    A model that is not shifted computes the last token that the target has computed once more,
    which it need not have met (it may be the last draft), then the newest one, then all drafts but
    the last. A shifted one has met the newest token in its prefill.
    """
    return max(1, count - 1) if shifted else count + 1


class ChainInputs(StepBuffers):
    """Static inputs of the chain: a row for each request that drew a token in the step, with as
    many tokens each as the chain computes. Where they stand follows from where the step has
    left them.

    Args:
        step: The buffers of the target's steps.
        max_model_len: Most tokens of a request.
        count: Tokens that are drafted.
        draft: What drafts.
    """

    def __init__(
        self, step: StepBuffers, max_model_len: int, count: int, draft: DraftModel
    ) -> None:
        self.width = chain_width(count, draft.shifted)
        rows, platform = step.rows, step.platform
        most = step.max_requests
        super().__init__(
            most * self.width, most, max_model_len, step.layout, platform,
            shared=step.shared, num_drafts=rows.num_drafts, rows=rows,
        )  # fmt: skip
        self._step = step
        self._back = 0 if draft.shifted else 1
        device = platform.device
        self.hidden = torch.zeros(
            most if draft.shifted else 0, draft.hidden_size,
            dtype=next(draft.parameters()).dtype, device=device,
        )  # fmt: skip
        """[R, D]: a shifted model's behind the last token that counts."""
        self.parameters = {
            name: torch.zeros(most, dtype=kind, device=device) for name, kind in _PARAMETERS.items()
        }
        self._numbers = torch.zeros_like(rows.numbers)
        begins = np.arange(most + 1, dtype=np.int32)
        self.begins = [to_device(begins * each, platform) for each in (0, 1, 2, self.width)]
        """Of passes with so many tokens of each request where those of each begin; the last: of
        whole chains."""
        self._known_tokens = to_device(np.full(most, self._back, dtype=np.int32), platform)

    def last_tokens(self, requests: int) -> Tensor:
        """[R] int64: of each request of the step in the target's buffers, which has moved on, the
        last token that counts, by its place in the step."""
        step = self._step
        rows, known = step._rows.device[:requests], step._known.device[:requests]
        accepted = self.rows.numbers[ACCEPTED].index_select(0, rows)
        return step.query_start_loc.device[:requests] + known + accepted - 1

    def follow(
        self, drawing: Ints, number: Tensor | None, last: Tensor, padded: StepShape, *, same: bool,
        greedy: bool,
    ) -> Tensor:  # fmt: skip
        """Begin where the requests of the step in the buffers stand now.

        Args:
            drawing: [R], rows of those that drew a token.
            number: [R] int64 on the device, their numbers in the step; None: they are all of it.
            last: [R] int64, their last tokens that count.
            padded: What the chain is padded to.
            same: They are those of the last step, and so are their block tables.
            greedy: The likeliest tokens are drafted, whatever requests ask for.

        Returns:
            [R] int64: their rows.
        """
        count, most, width = len(drawing), padded.num_requests, self.width
        step, numbers = self._step, self._numbers
        shapes = StepShape.decode(count, width), padded
        rows = self._rows.device[:count]
        if not same or self._padded != shapes:
            of_step = step._rows.device
            rows.copy_(of_step[:count] if number is None else of_step.index_select(0, number))
            self._rows.device[count:most].zero_()
            for name, each in self.rows.parameters(rows).items():
                if name in self.parameters:
                    self.parameters[name][:count].copy_(each)
            self.parameters["temperature"][0 if greedy else count : most].zero_()
            self.query_start_loc.device[: most + 1].copy_(self.begins[-1][: most + 1])
            self._gather(most)
        numbers.copy_(self.rows.numbers)
        if self._back:
            numbers[COMPUTED].sub_(self._back).clamp_(min=0)
            ids = self.input_ids.device[: count * width].view(count, width)
            ids[:, 0].copy_(step.input_ids.device.index_select(0, last))
        ops.lay_out(
            numbers,
            self._rows.device[:most],
            self._known_tokens[:most],
            self.query_start_loc.device[: most + 1],
            self.block_tables[:, :most],
            self._block_sizes,
            self.input_ids.device[: most * width],
            self.positions.device[: most * width],
            self.draws[: most * width],
            self.slots[:, : most * width],
            self.seq_lens.device[:most],
            self._accepted.device[:most],
            self._fresh.device[:most],
            width,
        )
        first = self.draws[: count * width].view(count, width)[:, self._back]
        self.parameters["number"][:count].copy_(first)
        self.known.follow(drawing, np.full(count, width, dtype=np.int64), self._back)
        self._padded = shapes
        return rows

    def fill_draws(self, live: StepShape, seed: int) -> None:
        """What requests of a made-up step ask of their draws: one in two takes the likeliest."""
        random = np.random.default_rng([seed, live.num_requests])
        count = live.num_requests
        values = {
            "temperature": random.uniform(0.5, 1.5, count) * (np.arange(count) % 2 == 0),
            "top_k": random.integers(0, 50, count),
            "top_p": random.uniform(0.8, 1.0, count),
            "min_p": random.uniform(0.0, 0.1, count),
            "seed": random.integers(-(1 << 62), 1 << 62, count),
            "number": random.integers(1, 1 << 12, count),
        }
        for name, each in self.parameters.items():
            each[:count].copy_(to_device(values[name], self.platform))
        if self.hidden.numel():
            generator = torch.Generator(device=self.hidden.device).manual_seed(seed)
            shape = (count, self.hidden.shape[1])
            drawn = torch.randn(shape, generator=generator, device=self.hidden.device)
            self.hidden[:count].copy_(drawn)

    def fill_padding(self, live: StepShape, bucket: StepShape) -> None:
        begin, end = live.num_requests, bucket.num_requests
        for each in self.parameters.values():
            each[begin:end].zero_()
        self.hidden[begin:end].zero_()
        super().fill_padding(live, bucket)

    def arrays(self) -> dict[str, Tensor]:
        """All device memory of this alone, by name."""
        shared = self.rows.arrays()
        own = {name: each for name, each in super().arrays().items() if name not in shared}
        constants = dict(zip(("nowhere", "singles", "pairs", "wholes"), self.begins, strict=True))
        own.update(
            self.parameters, hidden=self.hidden, numbers=self._numbers,
            known_tokens=self._known_tokens, **constants,
        )  # fmt: skip
        return {f"draft chain's {name}": each for name, each in own.items() if each.numel()}

    def views(self, tokens: int, requests: int) -> dict[str, Tensor]:
        own = {name: each[:requests] for name, each in self.parameters.items()}
        if self.hidden.numel():
            own["hidden"] = self.hidden[:requests]
        return {**super().views(tokens, requests), **own}


class DraftChain:
    """All passes of a draft model behind a step
    (:class:`reprise.graphs.contract.Computation`): drafts follow each other on the device, and one
    graph has them all.

    A pass reads its positions, lengths and slots from static inputs that have those of all passes,
    so that nothing is counted up in the graph, of padding least of all.

    Args:
        draft: What drafts.
        count: Tokens that are drafted.
        inputs: Where the requests stand.
        target: Lists the memory.
    """

    def __init__(
        self, draft: DraftModel, count: int, inputs: ChainInputs, target: ForwardPass
    ) -> None:
        self.ops = target.ops
        self.model: Callable[..., Any] = draft
        self.facts: Facts = inputs.known.facts
        self._draft, self._count, self._inputs, self._target = draft, count, inputs, target
        device, dtype = inputs.platform.device, next(draft.parameters()).dtype
        most = inputs.max_requests
        self._drafts = torch.zeros(count, most, dtype=torch.int64, device=device)
        self._logits = torch.zeros(most, draft.vocab_size, dtype=dtype, device=device)
        self._behind = torch.arange(
            inputs.width - 1, -1, -1, dtype=torch.int32, device=device
        ).unsqueeze(1)
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
        )

    # ---- the passes ----------------------------------------------------------------------

    def forward(self, shape: StepShape, model: Callable[..., Any] | None = None) -> Tensor:
        """[K, R]: the drafts of each request, -1 where the request has no place for the token that
        one is drawn behind."""
        inputs, requests = self._inputs, shape.num_requests
        run = model or self.model
        passes = _Passes(inputs, shape, self._behind)
        back = not self._draft.shifted
        parameters = {name: each[:requests] for name, each in inputs.parameters.items()}
        number = parameters.pop("number")
        logits = self._logits[:requests]
        if back:
            # The last token that the target has computed, and the newest one.
            pair = run(passes.first_two(), None)
            hidden = pair.view(requests, 2, -1)[:, 1].contiguous()
        else:
            hidden = inputs.hidden[:requests]
        for draft in range(self._count):
            raw = self._draft.logits(hidden, logits).float()
            drawn = ops.sample(raw, *parameters.values(), number + draft)
            # In trials ops give memory of any content, and the next pass looks it up.
            drawn = self._draft.token_ids(drawn.clamp(0, self._draft.vocab_size - 1))
            behind = draft + 2 * back - 1
            self._drafts[draft, :requests] = torch.where(passes.there(behind), drawn, -1)
            if draft + 1 < self._count:
                hidden = run(passes.one(behind + 1, drawn), None if back else hidden)
        return self._drafts[:, :requests]

    def pad(self, live: StepShape, bucket: StepShape) -> None:
        self._inputs.fill_padding(live, bucket)

    def inputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        return self._inputs.views(shape.num_tokens, shape.num_requests)

    def outputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        return {"drafts": self._drafts[:, : shape.num_requests]}

    def memory(self) -> Mapping[str, Region]:
        return self._target.memory()

    def mend(self, weights: Sequence[str]) -> None:
        self._target.mend(weights)

    def kind(self, live: StepShape, bucket: StepShape, exact: bool = False) -> Kind:
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
        return _ChainRows(*self._target.where_rows_are(), self._inputs, bucket)

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
        self._lengths = torch.where(ends > 0, ends - behind, 0)
        """[W, R]: tokens of each request up to each token of the chain."""
        kept = inputs.layout.tables[0].block_size
        self._there = self._slots[:, 0] >= kept
        """[W, R]: which tokens have a place."""

    def there(self, token: int) -> Tensor:
        """[R]: the token of each request has a place; -1: the one before all."""
        return self._there[token] if token >= 0 else self._lengths[-1] > 0

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
