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
    """

    def __init__(self, compiled: Any, held: frozenset[int], min_tokens: float) -> None:
        import xgrammar

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
        if self.num_tokens > known:
            self._matcher.rollback(self.num_tokens - known)
            self.num_tokens = known
        taken = 0
        for token in tokens:
            if self.ended or not self._matcher.accept_token(token):
                break
            taken += 1
        self.num_tokens += taken
        return taken

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
            if draft is not None:
                if draft < 0 or not self._matcher.accept_token(draft):
                    break
                self.num_tokens += 1
            if self.ended:
                break
            self._fill_row(words, filled)
            filled += 1
        if self.num_tokens > before:
            self._matcher.rollback(self.num_tokens - before)
            self.num_tokens = before
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
