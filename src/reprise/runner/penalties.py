"""What requests have seen, kept on the device for their penalties."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reprise import ops
from reprise.ops.apply_penalties import IN_PROMPT
from reprise.platforms import Platform
from reprise.request import Request
from reprise.runner.buffers import to_device


class SeenTokens:
    """The counts of ``ops.apply_penalties``, a slot for each request that has penalties.

    They grow with a request on the device from draw to draw, so that no draw waits for the host.

    Args:
        vocab_size: V.
        max_requests: Most requests at a time.
        platform: Where the counts are.
    """

    def __init__(self, vocab_size: int, max_requests: int, platform: Platform) -> None:
        self.vocab_size = vocab_size
        self.platform = platform
        self._max_requests = max_requests
        self.forget()

    @functools.cached_property
    def counts(self) -> Tensor:
        """[S, V] int32. Not before somebody asks for penalties: it is large."""
        size = (self._max_requests, self.vocab_size)
        return torch.zeros(size, dtype=torch.int32, device=self.platform.device)

    def memory(self) -> dict[str, Tensor]:
        """The counts, once there are any."""
        return {"counts": self.counts} if "counts" in self.__dict__ else {}

    def slot_of(self, request: Request) -> int:
        """The request's row of :attr:`counts`, which is made from its tokens if it has none."""
        slot = self._slots.get(request.request_id)
        if slot is None:
            slot = self._slots[request.request_id] = self._free.pop()
            row = self.counts[slot].zero_()
            prompt = np.unique(np.array(request.prompt_token_ids, dtype=np.int64))
            row.index_fill_(0, to_device(prompt, self.platform), IN_PROMPT)
            if request.output_token_ids:
                output = np.array(request.output_token_ids, dtype=np.int64)
                tokens = to_device(output, self.platform)
                row.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))
        return slot

    def release(self, request_id: str) -> bool:
        """Forget a request; returns whether it had a slot."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)
        return slot is not None

    def forget(self) -> None:
        """Forget all requests."""
        self._slots: dict[str, int] = {}
        self._free = list(range(self._max_requests))


class Penalties:
    """Those of some rows of a batch.

    Args:
        rows: The rows' numbers with their requests.
        seen: Has, or gets, a slot for each request.
    """

    def __init__(self, rows: Sequence[tuple[int, Request]], seen: SeenTokens) -> None:
        slots = np.array([seen.slot_of(request) for _, request in rows], dtype=np.int64)
        parameters = [request.params for _, request in rows]
        columns = (
            np.array([row for row, _ in rows], dtype=np.int64),
            slots,
            slots * seen.vocab_size,
            np.array([each.repetition_penalty for each in parameters], dtype=np.float32),
            np.array([each.presence_penalty for each in parameters], dtype=np.float32),
            np.array([each.frequency_penalty for each in parameters], dtype=np.float32),
        )
        self._rows, self._slots, self._starts, *self._strengths = (
            to_device(each, seen.platform) for each in columns
        )
        self._counts = seen.counts
        self._ones = torch.ones_like(self._rows, dtype=torch.int32)

    def memory(self) -> dict[str, Tensor]:
        """What this keeps on the device, by name."""
        names = ("repetition", "presence", "frequency")
        return {
            "penalised rows": self._rows,
            "slots": self._slots,
            "starts": self._starts,
            "ones": self._ones,
            **dict(zip(names, self._strengths, strict=True)),
        }

    def apply(self, logits: Tensor) -> None:
        """Change the rows of ``logits`` [R, V] float32 in place."""
        ops.apply_penalties(logits, self._rows, self._counts, self._slots, *self._strengths)

    def count(self, tokens: Tensor) -> None:
        """Note what was drawn, [R] int64."""
        self._counts.view(-1).index_add_(0, self._starts + tokens[self._rows], self._ones)


def is_penalised(request: Request) -> bool:
    parameters = request.params
    return (
        parameters.repetition_penalty != 1
        or parameters.presence_penalty != 0
        or parameters.frequency_penalty != 0
    )
