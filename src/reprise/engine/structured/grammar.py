"""How far one sequence has come in its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Words = np.ndarray[Any, Any]


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
        tokens = np.array(sorted(held), dtype=np.int64)
        self._held_words = tokens // 32
        self._held_bits = (1 << (tokens % 32)).astype(np.uint32).view(np.int32)

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

    def fill(self, words: Words, drafts: Sequence[int] = ()) -> int:
        """Write which tokens may come next, and which behind each of the drafts.

        Args:
            words: [1 + K, ceil(V / 32)] int32, all ones. Rows that are of no account are left so:
                behind a draft that the grammar refuses, behind its end, and where nothing may come,
                whose token is refused whatever it is.
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
            if self._begins is not None:
                self._fill_row(words, filled)
            filled += 1
        self._take_back(before)
        return filled

    def _fill_row(self, words: Words, row: int) -> None:
        found = words[row]
        self._matcher.fill_next_token_bitmask(torch.from_numpy(words), row)
        if self.num_tokens < self._min_tokens and len(self._held_words):
            free = found.copy()
            np.bitwise_and.at(free, self._held_words, ~self._held_bits)
            if free.any():
                found[:] = free
        if not found.any():
            found.fill(-1)
