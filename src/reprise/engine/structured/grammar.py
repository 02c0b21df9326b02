"""How far one sequence has come in its grammar."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from reprise.engine.structured.compiler import Compiled
from reprise.engine.structured.masks import MaskRows, Others
from reprise.engine.structured.white_space import MOST


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
        self._past: object = object()
        """Another one once a token was taken back."""
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
            self._past = object()
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
        state = self._state() if later and masks.looks else None
        masks.allow(row, self._matcher, others, crowded, state=state, later=later)

    def _state(self) -> Hashable | None:
        """What the matcher is about to do: behind tokens that leave it alike it allows the same.

        xgrammar prints it for its own tests, for a tenth of what it takes to fill a mask: places in
        rules, and behind how many bytes each was entered, where what may follow the rule is known.
        That the text may end is not among it. None: this version does not say it.
        """
        printed = getattr(self._matcher, "_debug_print_internal_state", None)
        if printed is None:
            return None
        states = printed().partition("\n")[2]  # the line before counts all bytes
        return (self._past, states, self._matcher.is_completed()) if states else None
