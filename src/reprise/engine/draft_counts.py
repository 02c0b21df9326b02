"""How often drafts count."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two lines in the log, while anything is drafted."""


@dataclass(frozen=True)
class DraftStats:
    """Counts from the start. Tokens behind one that ends its request are counted, too."""

    drafts: int = 0
    """Times that tokens were drafted for a request and verified."""
    drafted: int = 0
    """Tokens, of all of them."""
    accepted_at: tuple[int, ...] = ()
    """Of each place in a draft, how often the token there counted."""

    @property
    def accepted(self) -> int:
        """Tokens that counted."""
        return sum(self.accepted_at)

    @property
    def acceptance_length(self) -> float:
        """Tokens that a step brings a request on average, the one behind the accepted drafts
        included."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @property
    def acceptance_rate(self) -> float:
        """The fraction of the drafted tokens that counted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def position_rates(self) -> list[float]:
        """Of each place, how many of all drafts counted up to there: these fall, and their sum and
        one is the acceptance length."""
        return [each / max(1, self.drafts) for each in self.accepted_at]

    def __sub__(self, earlier: DraftStats) -> DraftStats:
        before = earlier.accepted_at or (0,) * len(self.accepted_at)
        counts = (a - b for a, b in zip(self.accepted_at, before, strict=True))
        return DraftStats(
            self.drafts - earlier.drafts, self.drafted - earlier.drafted, tuple(counts)
        )

    def __str__(self) -> str:
        places = " ".join(f"{each:.2f}" for each in self.position_rates)
        return (
            f"acceptance length {self.acceptance_length:.2f}, {self.accepted} of {self.drafted} "
            f"drafted tokens counted ({self.acceptance_rate:.0%}; by place {places})"
        )


class DraftCounts:
    """Counts, and says so in the log now and then.

    Args:
        most: Tokens of a draft.
    """

    def __init__(self, most: int) -> None:
        self._drafts = self._drafted = 0
        self._accepted_at = [0] * most
        self._told = DraftStats()
        self._told_at = time.perf_counter()

    def add(
        self, num_decodes: int, drafted: Sequence[int], sampled: Sequence[Sequence[int]]
    ) -> None:
        """A step has verified drafts.

        Args:
            num_decodes: Its first requests, the ones that can have drafts.
            drafted: Of each request, how many tokens.
            sampled: Its new tokens, of which the last is no draft.
        """
        for count, tokens in zip(drafted[:num_decodes], sampled[:num_decodes], strict=True):
            if count == 0:
                continue
            self._drafts += 1
            self._drafted += count
            for place in range(len(tokens) - 1):
                self._accepted_at[place] += 1
        now = time.perf_counter()
        if now - self._told_at >= EVERY:
            stats = self.stats()
            if stats.drafts > self._told.drafts:
                seconds = now - self._told_at
                logger.info("drafts of the last %.0f s: %s", seconds, stats - self._told)
            self._told, self._told_at = stats, now

    def stats(self) -> DraftStats:
        """So far."""
        return DraftStats(self._drafts, self._drafted, tuple(self._accepted_at))
