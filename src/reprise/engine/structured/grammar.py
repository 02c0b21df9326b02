"""How far one sequence has come in its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Words = np.ndarray[Any, Any]
FIRST = 16
"""Words of a mask that are looked at before the others: most masks allow a token of few bytes, and
those come first."""


class MaskRows:
    """Room for the masks of a step.

    Args:
        rows: Most of them.
        vocab_size: Of the logits.
    """

    def __init__(self, rows: int, vocab_size: int) -> None:
        self.tensor = torch.empty((rows, -(-vocab_size // 32)), dtype=torch.int32)
        self.words: Words = self.tensor.numpy()
        """[M, ceil(V / 32)] int32, the same memory."""
        self._bits = self.words.data
        self._held: dict[int, list[tuple[int, int]]] = {}

    def hold(self, row: int, others: Sequence[tuple[int, int]]) -> None:
        """Allow some tokens only where nothing else is.

        Args:
            row: Which mask.
            others: Of each word that has such tokens, its number and the bits of all others.
        """
        self._held[row] = [(word, self._bits[row, word]) for word, _ in others]
        for word, free in others:
            self._bits[row, word] &= free

    def settle(self, count: int) -> Words:
        """The first ``count`` masks, all of which allow something."""
        found = self.words[:count]
        for row in np.flatnonzero(~found[:, :FIRST].any(axis=1)).tolist():
            for word, bits in self._held.get(row, ()) if not found[row].any() else ():
                self._bits[row, word] = bits
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
            if self._begins is not None:
                self._fill_row(masks, begin + filled)
            else:
                masks.words[begin + filled] = -1
            filled += 1
        self._take_back(before)
        return filled

    def _fill_row(self, masks: MaskRows, row: int) -> None:
        self._matcher.fill_next_token_bitmask(masks.tensor, row)
        if self.num_tokens < self._min_tokens:
            masks.hold(row, self._others)
