"""How many tokens are drafted, where that is not always as many."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from reprise.speculation import Speculation
from reprise.step import Step

logger = logging.getLogger(__name__)

TRIED = 12
"""Steps that are measured of each number of drafts, before one is chosen."""
SETTLED = 2
"""Of these, the first ones, which are not counted: requests have no drafts yet, or still have some,
and what they compute may be new to the device."""
AGAIN = 2048
"""Steps until the others are tried again: texts and requests change."""
CATCH_UP = 128
"""Of these, the last ones, in which a draft model that rested computes what the target does: it
drafts from these tokens, whatever it has missed before them."""
BETTER = 1.03
"""What is chosen next has to be as many times as fast as what is chosen now."""


@dataclass
class _Level:
    """What is known of steps that draft so many tokens."""

    seconds: float = 0.0
    tokens: float = 0.0
    """Of each request, on average."""
    steps: int = 0
    """Since it was last chosen or tried."""
    known: bool = False

    def add(self, seconds: float, tokens: float) -> None:
        self.steps += 1
        if self.steps <= SETTLED:
            return
        counted = self.steps - SETTLED
        # The mean of a trial, then of about the last sixty-four steps.
        share = 1 / min(counted, 64)
        if counted == 1 and not self.known:
            self.seconds, self.tokens = seconds, tokens
        self.seconds += share * (seconds - self.seconds)
        self.tokens += share * (tokens - self.tokens)
        self.known = self.known or self.steps >= TRIED

    @property
    def speed(self) -> float:
        """Tokens of a request in a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return f"{self.tokens:.2f} tokens in {self.seconds * 1e3:.2f} ms"


@dataclass
class _Range:
    """Steps of about as many requests."""

    levels: dict[int, _Level]
    chosen: int | None = None
    trying: list[int] = field(default_factory=list)
    """Levels that are to be tried, the first one now."""
    left: int = 0
    """Steps until then."""


class DraftChoice:
    """Says how many tokens are drafted in a step, from the number of its requests.

    Where ``num_speculative_tokens_per_batch_size`` is ``auto``, it tries each number for a few
    steps in each range of requests (up to 1, 2, 4, 8, ...), takes the one with which a request gets
    most tokens in a second, and tries the others again now and then. Tokens are the same whatever
    it chooses.

    Args:
        speculation: What may be chosen.
    """

    def __init__(self, speculation: Speculation) -> None:
        self._speculation = speculation
        self._ranges: dict[int, _Range] = {}
        self._last: tuple[int, int, float] | None = None
        """Of the last step, if its requests did nothing but decode: how many tokens it drafted, how
        many requests it had, and when it was done."""

    def choose(self, requests: int) -> int:
        """The number of tokens for the next step, which so many requests are part of; 0: none that
        wants drafts."""
        if requests == 0:
            return self._speculation.levels[0]
        if not self._speculation.measured:
            return self._speculation.level(requests)
        found = self._range(requests)
        if found.trying:
            return found.trying[0]
        assert found.chosen is not None, "what is not being tried has been chosen"
        return found.chosen

    def resting(self, requests: int) -> bool:
        """Whether a draft model may leave out the decodes of a step without drafts, which so many
        requests are part of: drafts have paid nowhere, and are not tried again soon. Where they
        pay for fewer requests, these may be what is left of more."""
        if requests == 0 or not self._speculation.measured:
            return False
        found = self._range(requests)
        return found.left > CATCH_UP and not any(each.chosen for each in self._ranges.values())

    def step_done(self, step: Step, sampled: Sequence[Sequence[int]]) -> None:
        """A step has brought these tokens, now: measure it, if one like it was done before."""
        now, requests = time.perf_counter(), len(step.rows)
        known, self._last = self._last, None
        if step.drafting is None or step.num_decodes < requests:
            return
        self._last = step.drafting, requests, now
        if known is not None and known[:2] == (step.drafting, requests):
            tokens = sum(map(len, sampled)) / requests
            self.observe(requests, step.drafting, now - known[2], tokens)

    def observe(self, requests: int, drafted: int, seconds: float, tokens: float) -> None:
        """A step in which requests did nothing but decode has followed one like it.

        Args:
            requests: Of the step.
            drafted: What :meth:`choose` said for it.
            seconds: From the end of the step before to its own.
            tokens: That it brought each request on average.
        """
        if not self._speculation.measured:
            return
        found = self._range(requests)
        level = found.levels.get(drafted)
        if level is None:
            return
        level.add(seconds, tokens)
        if found.trying:
            if drafted == found.trying[0] and level.steps >= TRIED:
                found.trying.pop(0)
                if found.trying:
                    found.levels[found.trying[0]].steps = 0
                else:
                    self._decide(requests, found)
            return
        found.left -= 1
        if found.left <= 0:
            found.trying = [each for each in found.levels if each != found.chosen]
            found.levels[found.trying[0]].steps = 0

    def _range(self, requests: int) -> _Range:
        number = max(0, requests - 1).bit_length()
        if number not in self._ranges:
            levels = {each: _Level() for each in reversed(self._speculation.levels)}
            self._ranges[number] = _Range(levels, trying=list(levels))
        return self._ranges[number]

    def _decide(self, requests: int, found: _Range) -> None:
        best = max(found.levels, key=lambda each: found.levels[each].speed)
        before = found.chosen
        if before is not None and best != before:
            now = found.levels[before].speed
            if found.levels[best].speed < BETTER * now:
                best = before
        found.chosen, found.left = best, AGAIN
        if best == before:
            return
        number = max(0, requests - 1).bit_length()
        logger.info(
            "drafts: %d tokens a step for %s requests (%s)",
            best,
            f"{(1 << number - 1) + 1} to {1 << number}" if number > 1 else 1 << number,
            "; ".join(f"{drafts}: {level}" for drafts, level in found.levels.items()),
        )
