"""What the passes of a draft model behind a step read: where its requests stand, and what they ask
of their draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.runner.arena import to_device
from reprise.runner.buffers import StepBuffers
from reprise.runner.drafts.draft_model import DraftModel
from reprise.runner.step_inputs import StepInputs
from reprise.shape import StepShape
from reprise.step import Step

_PARAMETERS = {
    "temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32,
    "min_p": torch.float32, "seed": torch.int64, "number": torch.int64,
}  # fmt: skip
"""Of the draws of each request, in the order of ``ops.sample``; ``number``: of the first one."""


def chain_width(count: int, draft: DraftModel) -> int:
    """Tokens of each request that a chain of ``count`` drafts computes, in a row.

    A model that is not shifted computes the last token that the target has computed once more,
    which it need not have met (it may be the last draft), then the newest one, then all drafts but
    the last. One with states, which cannot compute a token twice, has met that one in its prefill,
    and a shifted one the newest token, too.
    """
    if draft.shifted:
        return max(1, count - 1)
    return count if draft.keeps_states else count + 1


class ChainInputs(StepInputs):
    """Static inputs of the chain: a row for each request that drew a token in the step, with as
    many tokens each as the chain computes. Where they stand follows from where the step has
    left them.

    Args:
        step: The buffers of the target's steps.
        max_model_len: Most tokens of a request.
        counts: How many tokens are drafted now or then.
        draft: What drafts.
    """

    def __init__(
        self, step: StepBuffers, max_model_len: int, counts: Sequence[int], draft: DraftModel
    ) -> None:
        self.widths = {chain_width(each, draft): each for each in sorted(counts)}
        """Of all chains, and how many tokens each drafts at most."""
        self.width = max(self.widths)
        rows, platform = step.rows, step.platform
        most = step.max_requests
        super().__init__(
            rows, most * self.width, most, max_model_len, step.layout, platform,
            shared=step.shared,
        )  # fmt: skip
        self._step = step
        self._behind: tuple[StepShape, int] | None = None
        """Of the step that was followed last: its shape, and the ids of the prefill."""
        self._back = 0 if draft.shifted or draft.keeps_states else 1
        self._replays = draft.keeps_states
        device = platform.device
        self.hidden = torch.zeros(
            most if draft.shifted else 0, draft.hidden_size,
            dtype=next(draft.parameters()).dtype, device=device,
        )  # fmt: skip
        """[R, D]: a shifted model's behind the last token that counts."""
        self.parameters = {
            name: torch.zeros(most, dtype=kind, device=device) for name, kind in _PARAMETERS.items()
        }
        self.last = torch.zeros(most, dtype=torch.int64, device=device)
        """[R]: of each request of the chain the last token of the target's step that counts."""
        begins = np.arange(most + 1, dtype=np.int32)
        self.begins = {
            each: to_device(begins * each, platform) for each in sorted({1, 2, *self.widths})
        }
        """Of passes, and of whole chains, with so many tokens of each request where those of each
        begin."""
        self.of_chosen: tuple[Tensor, Tensor, Tensor] = self.last[:0], self.last[:0], self.hidden
        """Of the chosen requests of the last step: [C] int64, their rows; [C] of :attr:`last`; [C,
        D] of :attr:`hidden`."""
        self._not_told = to_device(np.full(most, -1, dtype=np.int64), platform)
        self._all = to_device(np.arange(most, dtype=np.int64), platform)

    def follow(
        self,
        step: Step,
        chosen: Sequence[int],
        shifted_ids: Tensor | None,
        padded: StepShape,
        width: int,
        *,
        greedy: bool,
    ) -> None:
        """Begin where the requests of the step in the target's buffers stand now, which have moved
        on, and shift its tokens for the prefill.

        Args:
            step: That step.
            chosen: [C], which of its requests drafts are made for.
            shifted_ids: See ``ops.draft_inputs``.
            padded: What the chain is padded to.
            width: Tokens of each request in the chain.
            greedy: The likeliest tokens are drafted, whatever requests ask for.
        """
        count, most = len(chosen), padded.num_requests
        shapes = StepShape.decode(count, width), padded
        drawing = step.rows
        if count < len(step.rows):
            drawing = [step.rows[each] for each in chosen]
        behind = step.shape, 0 if shifted_ids is None else shifted_ids.shape[0]
        goes_on = (
            self._again is not None
            and (self._padded, self._behind) == (shapes, behind)
            and drawing == self._last_rows == step.rows
            and not step.admitted
            and step.num_decodes == count
        )
        if goes_on:
            assert self._again is not None
            if any(step.edits):
                self._gather(most)
                self.known.tables_changed()
            self.known.follow_again(self._back, replays=self._replays)
            self._again()
        else:
            arguments = self._arguments(len(step.rows), step.num_tokens, count, most, width)
            if count < len(step.rows):
                arguments[6:8] = self._tell(step, chosen)
            given = (*arguments[:10], shifted_ids, *arguments[10:], width, self._back, greedy)
            self._again = ops.draft_inputs.repeatedly(*given)
            self._last_rows, self._padded, self._behind = list(drawing), shapes, behind
            self.of_chosen = self._rows.device[:count], self.last[:count], self.hidden[:count]
            self.query_start_loc.device[: most + 1].copy_(self.begins[width][: most + 1])
            self._gather(most)
            self.hidden[count:most].zero_()
            rows = np.array(drawing, dtype=np.int64)
            new = np.full(count, width, dtype=np.int64)
            self.known.follow(rows, new, self._back, replays=self._replays)

    def rest(self) -> None:
        """No request of this engine is drafted for, while others' are: the chain is padding."""
        self.forget()
        nobody = np.zeros(0, dtype=np.int64)
        self.known.follow(nobody, nobody, self._back, replays=self._replays)

    def _tell(self, step: Step, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What only the host knows of a step in which some requests draw nothing: [R] and [C]
        int64, see ``ops.draft_inputs``."""
        told = np.full(len(step.rows), -1, dtype=np.int64)
        for number, samples in enumerate(step.samples):
            if not samples:
                admission = self.rows.admitted[step.rows[number]]
                assert admission is not None, "a row computes known tokens of its admission"
                told[number] = admission.token_ids[self._step.starts(number) + step.counts[number]]
        both = to_device(np.concatenate([told, np.array(chosen, dtype=np.int64)]), self.platform)
        return both[: len(told)], both[len(told) :]

    def _arguments(
        self, requests: int, tokens: int, count: int, most: int, width: int
    ) -> list[Tensor]:
        """Of ``ops.draft_inputs`` if all requests draw, but the ids of the prefill and what is no
        tensor."""
        step, rows = self._step, self.rows
        return [
            rows.integers,
            rows.floats,
            step._rows.device[:requests],
            step._known.device[:requests],
            step.query_start_loc.device[: requests + 1],
            step.input_ids.device[:tokens],
            self._not_told[:requests],
            self._all[:count],
            rows.tables,
            self._block_sizes,
            self.last[:most],
            self._rows.device[:most],
            self.input_ids.device[: most * width],
            self.positions.device[: most * width],
            self.slots[:, : most * width],
            self.seq_lens.device[:most],
            self._accepted.device[:most],
            self._fresh.device[:most],
            *(each[:most] for each in self.parameters.values()),
        ]

    def example_behind(self, shifted_ids: Tensor | None) -> None:
        """Begin behind a step of the null row, which changes nothing."""
        given = self._arguments(1, 1, 1, 1, self.width)
        ops.draft_inputs(*given[:10], shifted_ids, *given[10:], self.width, self._back, False)
        self.forget()

    def states(self, table: int, requests: int) -> Tensor:
        """A chain goes on from copies, where the model has states."""
        copied = self.layout.tables[table].entries(1) > 1
        return self.block_tables[table, :requests, 1 if copied else 0]

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
            drawn = torch.randn(
                shape, generator=generator, dtype=torch.float32, device=self.hidden.device
            )
            self.hidden[:count].copy_(drawn)

    def _pad(self, live: StepShape, bucket: StepShape) -> list[tuple[int, int]]:
        begin, end = live.num_requests, bucket.num_requests
        for each in self.parameters.values():
            each[begin:end].zero_()
        self.hidden[begin:end].zero_()
        return super()._pad(live, bucket)

    def arrays(self) -> dict[str, Tensor]:
        """All device memory of this alone, by name."""
        shared = self.rows.arrays()
        own = {name: each for name, each in super().arrays().items() if name not in shared}
        constants = {f"begins of {width}": each for width, each in self.begins.items()}
        own.update(
            self.parameters, hidden=self.hidden, last=self.last, not_told=self._not_told,
            every=self._all, **constants,
        )  # fmt: skip
        return {f"draft chain's {name}": each for name, each in own.items() if each.numel()}

    def views(self, tokens: int, requests: int) -> dict[str, Tensor]:
        own = {name: each[:requests] for name, each in self.parameters.items()}
        if self.hidden.numel():
            own["hidden"] = self.hidden[:requests]
        return {**super().views(tokens, requests), **own}
