"""How far one sequence has come in its grammar."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from reprise.engine.structured.compiler import Compiled
from reprise.engine.structured.white_space import MOST, WhiteSpace, Words
from reprise.platforms import usable_cpus

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

Crowded = tuple[WhiteSpace, int]
"""What white space is, and how many characters of it come before."""
Others = tuple[tuple[int, int], ...]
"""All tokens but some: of each word of a mask that has such tokens, its number and the bits of all
others."""


class MaskRows:
    """An engine's masks of a step, in memory that those of the next step are written to: they have
    to be on the device, or elsewhere, by then.

    Args:
        vocab_size: Of the logits.
        pinned: The memory is page-locked.
    """

    def __init__(self, vocab_size: int, *, pinned: bool = False) -> None:
        self._width, self._pinned = -(-vocab_size // 32), pinned
        self._tensor = torch.empty((0, self._width), dtype=torch.int32)
        self._words: Words = self._tensor.numpy()
        self.begin(0)

    def begin(self, rows: int) -> None:
        """A step has so many masks at most. Those of the one before are no more."""
        if rows > len(self._words):
            size = (1 << (rows - 1).bit_length(), self._width)
            self._tensor = torch.empty(size, dtype=torch.int32, pin_memory=self._pinned)
            self._words = self._tensor.numpy()
        self._later: tuple[list[int], list[Any]] = [], []
        """Rows that are to be filled, and their matchers."""
        self._others: dict[Others, list[int]] = {}
        self._crowded: dict[int, Crowded] = {}

    def allow_all(self, row: int) -> None:
        """Any token may come."""
        self._words[row] = -1

    def allow(
        self,
        row: int,
        matcher: Any,
        others: Others,
        crowded: Crowded | None,
        *,
        later: bool,
    ) -> None:
        """What the matcher allows may come.

        Args:
            row: Which mask.
            matcher: xgrammar's.
            others: Some tokens may come only where nothing else may.
            crowded: No more white space may come, behind so many characters of it; None: it may.
            later: It will be as it is now when the masks are settled.
        """
        if later:
            self._later[0].append(row)
            self._later[1].append(matcher)
        else:
            matcher.fill_next_token_bitmask(self._tensor, row)
        if others:
            self._others.setdefault(others, []).append(row)
        if crowded is not None:
            self._crowded[row] = crowded

    def settle(self, count: int) -> Words:
        """[M, ceil(V / 32)] int32: the first ``count`` masks, all of which allow something."""
        self._fill()
        for row, (spaces, length) in self._crowded.items():
            spaces.limit(self._words[row], length)
        for others, rows in self._others.items():
            self._hold_back(others, rows)
        found = self._words[:count]
        for row in _first_empty(found):
            if not found[row].any():
                found[row] = -1
        return found

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


def _first_empty(masks: Words) -> list[int]:
    """Of which masks the first words allow nothing."""
    return np.flatnonzero(~masks[:, :FIRST].any(axis=1)).tolist()


class Grammar:
    """Follows the tokens of one sequence.

    What it knows is a function of the tokens that it has taken, and tokens can be taken back: a
    sequence that was preempted, or whose steps were lost, goes on from those that it has.

    Args:
        compiled: Its grammar.
        held: Tokens that end the sequence, those that end the grammar among them. They are not
            drawn while it is shorter than ``min_tokens``, unless the grammar leaves no other.
        min_tokens: Of the sequence.
        begin_after: Token behind which the grammar begins; None: at once.
    """

    def __init__(
        self,
        compiled: Compiled,
        held: frozenset[int],
        min_tokens: float,
        begin_after: int | None = None,
    ) -> None:
        import xgrammar

        self._begin_after = begin_after
        self._begins: int | None = 0 if begin_after is None else None
        """Tokens before those that the grammar is about; None: it has not begun."""

        self._matcher = xgrammar.GrammarMatcher(compiled.grammar)
        self._spaces = compiled.spaces
        self._in_a_row = [0]
        """Characters of white space that are the last ones, before and behind each token that the
        matcher has taken."""
        self.ended = False
        """The text is complete, and no token follows."""
        self.num_tokens = 0
        """That it has taken."""
        self._min_tokens, self._held = min_tokens, held
        words = sorted({token // 32 for token in held})
        bits = np.zeros(len(words), dtype=np.uint32)
        for token in held:
            bits[words.index(token // 32)] |= np.uint32(1 << token % 32)
        self._others: Others = tuple(zip(words, (~bits.view(np.int32)).tolist(), strict=True))

    def take(self, tokens: Sequence[int], known: int) -> int:
        """Follow tokens.

        Args:
            tokens: In their order.
            known: Tokens of the sequence before them; what was taken behind those is taken back.

        Returns:
            How many follow the grammar, up to its end.
        """
        if self.num_tokens != known:
            self._take_back(known)
        for token in tokens:
            if self.ended or not self._accept(token):
                break
        return self.num_tokens - known

    def _accept(self, token: int) -> bool:
        if self._begins is None:
            self.num_tokens += 1
            if token == self._begin_after:
                self._begins = self.num_tokens
            return True
        if not self._matcher.accept_token(token):
            return False
        self.num_tokens += 1
        if token in self._held:
            self.ended = self._matcher.is_terminated()
        if self._spaces is not None:
            more = self._spaces.lengths.get(token)
            self._in_a_row.append(0 if more is None else self._in_a_row[-1] + more)
        return True

    def _take_back(self, known: int) -> None:
        """Forget what was taken behind the first ``known`` tokens."""
        count = self.num_tokens - known
        if count <= 0:
            return
        if self._begins is not None:
            followed = min(count, self.num_tokens - self._begins)
            self._matcher.rollback(followed)
            self.ended = self._matcher.is_terminated()
            if self._spaces is not None and followed:
                del self._in_a_row[-followed:]
            if self._begin_after is not None and known < self._begins:
                self._begins = None
        self.num_tokens = known

    def fill(self, masks: MaskRows, begin: int, drafts: Sequence[int] = ()) -> int:
        """Write which tokens may come next, and which behind each of the drafts.

        Args:
            masks: Where to.
            begin: Row for the next token; of those behind it each draft has one. All tokens may
                come where the grammar has not begun, and, once the masks are settled, where nothing
                may come: that token is refused whatever it is.
            drafts: Up to K tokens; -1 and what follows is none.

        Returns:
            How many rows were written.
        """
        if self.ended:
            return 0
        if not drafts:
            self._allow(masks, begin, later=True)
            return 1
        filled, before = 0, self.num_tokens
        for draft in (*drafts, -1):
            self._allow(masks, begin + filled, later=False)
            filled += 1
            if draft < 0 or not self._accept(draft) or self.ended:
                break
        self._take_back(before)
        return filled

    def _allow(self, masks: MaskRows, row: int, *, later: bool) -> None:
        """What may come next."""
        if self._begins is None:
            masks.allow_all(row)
            return
        others = self._others if self.num_tokens < self._min_tokens else ()
        crowded, length = None, self._in_a_row[-1]
        if self._spaces is not None and length >= MOST:
            crowded = self._spaces, length
        masks.allow(row, self._matcher, others, crowded, later=later)
