"""What the scheduler asks of the runner: one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from reprise.request import Request
from reprise.shape import StepShape


@dataclass(slots=True, eq=False)
class ScheduledRequest:
    """One request's part in a step: tokens ``start`` to ``start + num_tokens - 1``."""

    request: Request
    start: int
    num_tokens: int
    block_ids: list[int]
    """The request's list; later steps may append to it, never change what is there."""
    samples: bool
    """The step computes the request's last token: one more is sampled from it."""
    pending: bool
    """The token to compute is the one that the step before samples: it is on the device only."""


@dataclass(slots=True, eq=False)
class ScheduledStep:
    """What the runner computes in one forward pass."""

    index: int
    requests: list[ScheduledRequest]
    """First ``num_decodes`` requests with their one last token, then prefill chunks. A request's
    place is its row on the device; it changes as little as can be."""
    num_decodes: int
    num_tokens: int
    released: list[str]
    """Ids whose state the runner must drop before this step: finished or preempted since the
    last one. An id may be in ``requests`` too; it starts anew then."""
    continues: bool = False
    """The requests are those of the step before, in the same rows. Both are decode steps: each
    request's token is the one that the step before samples."""

    @property
    def shape(self) -> StepShape:
        """What the step costs: it says which graph may run it."""
        num_requests = len(self.requests)
        if self.num_tokens == num_requests:
            return StepShape.decode(num_requests)
        return StepShape.mixed(self.num_tokens, num_requests)
