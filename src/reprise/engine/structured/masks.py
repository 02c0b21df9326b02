"""The masks of a step, of which most are those of the step before."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from reprise.engine.structured.white_space import WhiteSpace, Words
from reprise.platforms import usable_cpus

logger = logging.getLogger(__name__)

ALONE_SECONDS = 2e-3
"""So long one thread fills a step's masks; what is left then is shared out, which costs half a
millisecond beside a device. A mask takes 2 to 4 us where a state knows its tokens, and up to 10 ms
where it has to look at each."""
AT_ONCE = 8
"""Masks between two looks at the time."""
THREADS = 8
"""At most: half of the CPUs that are there for this process, which have other work."""
FIRST = 16
"""Words of a mask that are looked at before the others: most masks allow a token of few bytes, and
those come first."""
POOR = 4
"""Where fewer than one of so many masks that are looked at could be kept, twice in a row, nobody
looks for a while: that costs a fifth of what filling a string's does, and more than a number's."""
REST = 6
"""Steps until somebody does."""
CHECKED = 256
"""Of so many masks that are kept one is filled all the same, and compared."""

Crowded = tuple[WhiteSpace, int]
"""What white space is, and how many characters of it come before."""
Others = tuple[tuple[int, int], ...]
"""All tokens but some: of each word of a mask that has such tokens, its number and the bits of all
others."""


class MaskRows:
    """An engine's masks of a step, in memory that those of the next step are written to: they have
    to be on the device, or elsewhere, by then.

    A mask that would be filled as it was is left as it is, and need not be sent again.

    Args:
        vocab_size: Of the logits.
        pinned: The memory is page-locked.
    """

    def __init__(self, vocab_size: int, *, pinned: bool = False) -> None:
        self._width, self._pinned = -(-vocab_size // 32), pinned
        self._tensor = torch.empty((0, self._width), dtype=torch.int32)
        self._words: Words = self._tensor.numpy()
        self._states: list[Hashable | None] = []
        """What each mask follows from; None: from something else every time."""
        self._sent = np.zeros(0, dtype=np.bool_)
        """Which were given out as they are."""
        self._keeps, self.num_kept = True, 0
        self._looked = self._found = self._poor = self._resting = 0
        self.begin(0)

    def begin(self, rows: int) -> None:
        """A step has so many masks at most. Those of the one before are no more."""
        if rows > len(self._words):
            size = (1 << (rows - 1).bit_length(), self._width)
            self._tensor = torch.empty(size, dtype=torch.int32, pin_memory=self._pinned)
            self._words = self._tensor.numpy()
            self.forget()
        self._pace()
        self._changed: list[int] = []
        """Rows that are other than before."""
        self._later: tuple[list[int], list[Any]] = [], []
        """Of them those that are to be filled, and their matchers."""
        self._others: dict[Others, list[int]] = {}
        self._crowded: dict[int, Crowded] = {}
        self._doubted: dict[int, Words] = {}
        """What was kept, of rows that are filled all the same."""

    def _pace(self) -> None:
        """Decide by the last step whether this one's masks are looked at."""
        if self._resting:
            self._resting -= 1
        elif self._looked:
            self._poor = self._poor + 1 if POOR * self._found < self._looked else 0
            if self._poor == 2:
                self._poor, self._resting = 0, REST
        self._looked = self._found = 0

    @property
    def looks(self) -> bool:
        """Whether a mask may be kept in this step whose state is told."""
        return not self._resting

    def forget(self) -> None:
        """No mask is what it should be: a step was lost, maybe while they were filled."""
        self._states = [None] * len(self._words)
        self._sent = np.zeros(len(self._words), dtype=np.bool_)

    def send_again(self) -> None:
        """Nobody has what was given out."""
        self._sent[:] = False

    def allow_all(self, row: int) -> None:
        """Any token may come."""
        if not self._kept(row, "all"):
            self._words[row] = -1

    def allow(
        self,
        row: int,
        matcher: Any,
        others: Others,
        crowded: Crowded | None,
        *,
        state: Hashable | None = None,
        later: bool,
    ) -> None:
        """What the matcher allows may come.

        Args:
            row: Which mask.
            matcher: xgrammar's.
            others: Some tokens may come only where nothing else may.
            crowded: No more white space may come, behind so many characters of it; None: it may.
            state: All that the mask follows from, but ``others`` and ``crowded``; None: nobody
                knows.
            later: The matcher stays as it is until the masks are settled.
        """
        if self._kept(row, None if state is None or crowded else (state, others)):
            return
        if later:
            self._later[0].append(row)
            self._later[1].append(matcher)
        else:
            matcher.fill_next_token_bitmask(self._tensor, row)
        if others:
            self._others.setdefault(others, []).append(row)
        if crowded is not None:
            self._crowded[row] = crowded

    def _kept(self, row: int, state: Hashable | None) -> bool:
        """Whether a mask is there; else it is to be written."""
        if state is not None:
            self._looked += 1
            if self._states[row] == state:
                self._found += 1
                self.num_kept += 1
                if self.num_kept % CHECKED:
                    return True
                self._doubted[row] = self._words[row].copy()
            elif not self._keeps:
                state = None
        self._states[row] = state
        self._changed.append(row)
        return False

    def settle(self, count: int) -> tuple[int, Words]:
        """The masks that nobody has yet.

        Args:
            count: Masks of the step.

        Returns:
            The first one's row, and [C, ceil(V / 32)] int32, from there to the last one, all of
            which allow something.
        """
        self._fill()
        for row, (spaces, length) in self._crowded.items():
            spaces.limit(self._words[row], length)
        for others, rows in self._others.items():
            self._hold_back(others, rows)
        for row in _first_empty(self._words[:count, :FIRST]):
            if not self._words[row].any():
                self._words[row] = -1
        self._compare()
        self._sent[self._changed] = False
        unsent = np.flatnonzero(~self._sent[:count])
        begin, end = (int(unsent[0]), int(unsent[-1]) + 1) if len(unsent) else (0, 0)
        self._sent[begin:end] = True
        return begin, self._words[begin:end]

    def _compare(self) -> None:
        """If a mask that was kept is another one, none is from now on."""
        for row, kept in self._doubted.items():
            if self._keeps and not np.array_equal(kept, self._words[row]):
                logger.error(
                    "xgrammar has filled two masks for one state of a grammar: masks are filled "
                    "for each step from now on; please report this, with its version"
                )
                self._keeps = False
                self._states = [None] * len(self._words)

    def _hold_back(self, others: Others, rows: list[int]) -> None:
        """Allow only the other tokens in these masks, where there are any."""
        words, index = self._words, np.array(rows)
        before = [(word, words[index, word]) for word, _ in others]
        for word, free in others:
            words[index, word] &= free
        for place in _first_empty(words[index, :FIRST]):
            row = rows[place]
            if not words[row].any():
                for word, bits in before:
                    words[row, word] = bits[place]

    def _fill(self) -> None:
        """Those that were left for later: a few by this thread, and if they take long, the others
        by several."""
        rows, matchers = self._later
        if not rows:
            return
        alone, together = self._batches
        began = time.perf_counter()
        for begin in range(0, len(rows), AT_ONCE):
            end = begin + AT_ONCE
            if begin and time.perf_counter() - began > ALONE_SECONDS:
                together.batch_fill_next_token_bitmask(matchers[begin:], self._tensor, rows[begin:])
                return
            alone.batch_fill_next_token_bitmask(matchers[begin:end], self._tensor, rows[begin:end])

    @functools.cached_property
    def _batches(self) -> tuple[Any, Any]:
        """Who fills masks in the thread that asks, and who does in threads of its own. One
        engine's: where two threads ask the same batch of xgrammar's at once, the end of the one's
        work ends the process."""
        import xgrammar

        several = min(THREADS, max(1, usable_cpus()[0] // 2))
        alone, together = (xgrammar.BatchGrammarMatcher(max_threads=n) for n in (1, several))
        return alone, together


def _first_empty(words: Words) -> list[int]:
    """Of which masks these first words allow nothing."""
    return np.flatnonzero(~words.any(axis=1)).tolist()
