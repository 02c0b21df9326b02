"""How far one sequence has come in its grammar."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from reprise.platforms import usable_cpus

Words = np.ndarray[Any, Any]
SHARED_OUT = 8
"""More masks than these are filled by several threads. One takes 2 to 40 us."""
THREADS = 8
"""At most: half of the CPUs that are there for this process, which have other work."""
FIRST = 16
"""Words of a mask that are looked at before the others: most masks allow a token of few bytes, and
those come first."""


class MaskThreads:
    """Fills masks side by side. One engine's: where two threads ask the same batch of xgrammar's at
    once, the end of the one's work ends the process."""

    def fill(self, matchers: Sequence[Any], masks: torch.Tensor, rows: Sequence[int]) -> None:
        """Write what each of the matchers allows into its row of ``masks``."""
        self._batch.batch_fill_next_token_bitmask(matchers, masks, rows)

    @functools.cached_property
    def _batch(self) -> Any:
        import xgrammar

        threads = min(THREADS, max(1, usable_cpus()[0] // 2))
        return xgrammar.BatchGrammarMatcher(max_threads=threads)


class MaskRows:
    """Room for the masks of a step.

    Args:
        rows: Most of them.
        vocab_size: Of the logits.
        threads: Fill many.
    """

    def __init__(self, rows: int, vocab_size: int, threads: MaskThreads) -> None:
        self._threads = threads
        self._tensor = torch.empty((rows, -(-vocab_size // 32)), dtype=torch.int32)
        self._words: Words = self._tensor.numpy()
        self._later: dict[int, Any] = {}
        self._others: dict[int, Sequence[tuple[int, int]]] = {}

    def allow_all(self, row: int) -> None:
        """Any token may come."""
        self._words[row] = -1

    def allow(
        self, row: int, matcher: Any, others: Sequence[tuple[int, int]], *, later: bool
    ) -> None:
        """What the matcher allows may come.

        Args:
            row: Which mask.
            matcher: xgrammar's.
            others: Some tokens may come only where nothing else may: of each word that has such
                tokens, its number and the bits of all others.
            later: It will be as it is now when the masks are settled.
        """
        if later:
            self._later[row] = matcher
        else:
            matcher.fill_next_token_bitmask(self._tensor, row)
        if others:
            self._others[row] = others

    def settle(self, count: int) -> Words:
        """[M, ceil(V / 32)] int32: the first ``count`` masks, all of which allow something."""
        if len(self._later) > SHARED_OUT:
            self._threads.fill(list(self._later.values()), self._tensor, list(self._later))
        else:
            for row, matcher in self._later.items():
                matcher.fill_next_token_bitmask(self._tensor, row)
        bits, held = self._words.data, {}
        for row, others in self._others.items():
            held[row] = [(word, bits[row, word]) for word, _ in others]
            for word, free in others:
                bits[row, word] &= free
        found = self._words[:count]
        for row in np.flatnonzero(~found[:, :FIRST].any(axis=1)).tolist():
            for word, before in held.get(row, ()) if not found[row].any() else ():
                bits[row, word] = before
            if not found[row].any():
                found[row] = -1
        return found


class Grammar:
    """Follows the tokens of one sequence.

    What it knows is a function of the tokens that it has taken, and tokens can be taken back: a
    sequence that was preempted, or whose steps were lost, goes on from those that it has.

    Args:
        compiled: xgrammar's compiled grammar.
        held: Tokens that end the sequence, and that are not drawn while it is shorter than
            ``min_tokens``, unless the grammar leaves no other.
        min_tokens: Of the sequence.
        begin_after: Token behind which the grammar begins; None: at once.
    """

    def __init__(
        self,
        compiled: Any,
        held: frozenset[int],
        min_tokens: float,
        begin_after: int | None = None,
    ) -> None:
        import xgrammar

        self._begin_after = begin_after
        self._begins: int | None = 0 if begin_after is None else None
        """Tokens before those that the grammar is about; None: it has not begun."""

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self.num_tokens = 0
        """That it has taken."""
        self._min_tokens = min_tokens
        words = sorted({token // 32 for token in held})
        bits = np.zeros(len(words), dtype=np.uint32)
        for token in held:
            bits[words.index(token // 32)] |= np.uint32(1 << token % 32)
        self._others = list(zip(words, (~bits.view(np.int32)).tolist(), strict=True))
        """Of each word of a mask that has such tokens, the bits of all others."""

    @property
    def ended(self) -> bool:
        """The text is complete, and no token follows."""
        return bool(self._matcher.is_terminated())

    def take(self, tokens: Sequence[int], known: int) -> int:
        """Follow tokens.

        Args:
            tokens: In their order.
            known: Tokens of the sequence before them; what was taken behind those is taken back.

        Returns:
            How many follow the grammar, up to its end.
        """
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
        return True

    def _take_back(self, known: int) -> None:
        """Forget what was taken behind the first ``known`` tokens."""
        count = self.num_tokens - known
        if count <= 0:
            return
        if self._begins is not None:
            self._matcher.rollback(min(count, self.num_tokens - self._begins))
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
        filled, before = 0, self.num_tokens
        for draft in (None, *drafts):
            if draft is not None and (draft < 0 or not self._accept(draft)):
                break
            if self.ended:
                break
            if self._begins is None:
                masks.allow_all(begin + filled)
            else:
                held = self.num_tokens < self._min_tokens
                others = self._others if held else ()
                masks.allow(begin + filled, self._matcher, others, later=not drafts)
            filled += 1
        self._take_back(before)
        return filled
