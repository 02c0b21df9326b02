"""The size of a step: what is scheduled, laid out and captured is told by it."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

Phase = Literal["decode", "mixed"]
"""``decode``: every request has the same number of new tokens, its newest one and drafts behind it,
which all get logits; ``mixed``: anything else."""
PHASES: tuple[Phase, ...] = ("decode", "mixed")


class StepShape(NamedTuple):
    """How much one step computes, live or padded to a bucket. Each step asks for several, so the
    newest are kept and comparing them calls nothing."""

    phase: Phase
    num_tokens: int
    num_requests: int
    query_len: int
    """New tokens of each request in the decode phase, 0 in the mixed phase."""
    prompt: bool = False
    """The tokens are those of one request, from its first one on. No graph is captured for that."""

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(num_requests: int, query_len: int = 1) -> StepShape:
        return StepShape("decode", num_requests * query_len, num_requests, query_len)

    @staticmethod
    @lru_cache(maxsize=1024)
    def mixed(num_tokens: int, num_requests: int, prompt: bool = False) -> StepShape:
        return StepShape("mixed", num_tokens, num_requests, 0, prompt)

    @property
    def empty(self) -> StepShape:
        """A step of this kind without any row: padded to this one, it is padding alone."""
        return StepShape(self.phase, 0, 0, self.query_len)

    def holding(self, other: StepShape | None) -> StepShape:
        """The smallest shape that has room for both.

        Raises:
            ValueError: They are of different phases, or their requests of different lengths.
        """
        if other is None:
            return self
        if (self.phase, self.query_len) != (other.phase, other.query_len):
            raise ValueError(f"no step is both {self} and {other}: lay out the one as the other")
        return StepShape(
            self.phase,
            max(self.num_tokens, other.num_tokens),
            max(self.num_requests, other.num_requests),
            self.query_len,
        )

    def laid_out_as(self, other: StepShape) -> StepShape:
        """This step in the phase of another one that holds it: of mixed steps any is one."""
        if (self.phase, self.query_len) == (other.phase, other.query_len):
            return self
        return StepShape.mixed(self.num_tokens, self.num_requests)

    @property
    def size(self) -> int:
        """What buckets count: requests in the decode phase, tokens in the mixed phase."""
        return self.num_requests if self.phase == "decode" else self.num_tokens

    def __str__(self) -> str:
        per_request = f", {self.query_len} tokens each" if self.query_len > 1 else ""
        return f"{self.phase}[{self.size}{per_request}]"
