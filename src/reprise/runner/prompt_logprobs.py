"""Log probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from reprise.platforms import Platform
from reprise.runner.arena import to_device
from reprise.runner.buffers import StepBuffers
from reprise.runner.logprobs import LogprobTensors, top_logprobs
from reprise.runner.output import Landing
from reprise.sampling_params import WHOLE_VOCABULARY
from reprise.step import Step

PROMPT_LOGPROB_ROWS = 256
"""Prompt positions whose logits are computed at once; bounds the memory of prompt logprobs."""


class PromptLogprobs:
    """Computes them from a step's hidden states, for requests that want them.

    Args:
        buffers: Of the step.
        platform: The device.
    """

    def __init__(self, buffers: StepBuffers, platform: Platform) -> None:
        self._buffers = buffers
        self._platform = platform

    def of(
        self,
        step: Step,
        result: Tensor,
        logits: Callable[[Tensor], Tensor],
        landing: Landing,
    ) -> dict[int, tuple[int, list[LogprobTensors]]]:
        """Of a step's requests by number: where the chunk began, and parts of the log probabilities
        of the tokens behind it, on their way to the host.

        Args:
            step: The one that was submitted last.
            result: [T, ...], its result, a row a token.
            logits: Of rows of it.
            landing: Where they go.
        """
        found: dict[int, tuple[int, list[LogprobTensors]]] = {}
        if step.num_decodes == len(step.rows):
            return found
        begin = step.num_tokens - sum(step.counts[step.num_decodes :])
        for number in range(step.num_decodes, len(step.rows)):
            count, start = step.counts[number], self._buffers.starts(number)
            admission = self._buffers.rows.admitted[step.rows[number]]
            assert admission is not None
            wanted, length = admission.params.prompt_logprobs, admission.num_prompt_tokens
            targets = admission.token_ids[start + 1 : min(start + count + 1, length)]
            if wanted is not None and targets:
                rows = result[begin : begin + len(targets)]
                found[number] = (
                    start,
                    [
                        landing.take(part)  # at once, so that the device never holds all of them
                        for part in self._parts(rows, targets, wanted, logits)
                    ],
                )
            begin += count
        return found

    def _parts(
        self,
        rows: Tensor,
        targets: Sequence[int],
        count: int,
        logits: Callable[[Tensor], Tensor],
    ) -> Iterator[LogprobTensors]:
        chosen = to_device(np.array(targets, dtype=np.int64), self._platform)
        for part, ids in zip(
            rows.split(PROMPT_LOGPROB_ROWS), chosen.split(PROMPT_LOGPROB_ROWS), strict=True
        ):
            whole = None
            if count == WHOLE_VOCABULARY:
                whole = torch.arange(len(part), device=part.device)
            yield top_logprobs(logits(part).float(), ids, max(count, 0), whole)
