"""How far one sequence has come in its grammar."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from reprise.engine.structured.automaton import State
from reprise.engine.structured.compiler import Compiled
from reprise.engine.structured.masks import Crowded, Key, MaskTable, Others, Places
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
        opened_by: With it: as the first token it opens what that other one ends, and behind any
            other first token the grammar has begun. None: it is open.
    """

    def __init__(
        self,
        compiled: Compiled,
        held: frozenset[int],
        min_tokens: float,
        begin_after: int | None = None,
        opened_by: int | None = None,
    ) -> None:
        import xgrammar

        self._begin_after, self._opened_by = begin_after, opened_by
        open_ = begin_after is not None and opened_by is None
        self._begins: int | None = None if open_ else 0
        """Tokens before those that the grammar is about; None: it has not begun."""

        self._matcher, self._followed = xgrammar.GrammarMatcher(compiled.grammar), 0
        """xgrammar's, which follows only where it is asked: behind so many of the tokens."""
        self._refused = False
        """xgrammar did not take a token that the automaton took."""
        self._tokens: list[int] = []
        """The tokens that the grammar covers."""
        self.automaton = compiled.automaton
        """Tells where the text stands; None: the matcher does."""
        start = None if self.automaton is None else self.automaton.start
        self._states: list[State | None] = [start]
        """Before and behind each token; None: the matcher alone knows."""
        self._spaces = compiled.spaces
        self._blanks = {} if compiled.spaces is None else compiled.spaces.lengths
        self._in_a_row = 0
        """Characters of white space that are the last ones."""
        self.ended = False
        """The text is complete, and no token follows."""
        self.num_tokens = 0
        """Tokens that it has taken."""
        self._min_tokens, self._held = min_tokens, held
        self._others = _others(held)
        self._masks: MaskTable | None = None
        """The table that the places are of."""
        self._places_while_short = self._places_then = self.places = Places()
        """Of masks that are kept, by :attr:`state`."""
        self.state: State | None = None
        """All that its mask follows from, beside what chooses :attr:`places`; None: there is more,
        or it is not known."""
        self._settle()

    def keep_in(self, masks: MaskTable) -> None:
        """Keep the masks of this grammar in a table."""
        self._masks = masks
        self._places_while_short = masks.places_of(self._others, None)
        self._places_then = masks.places_of((), None)
        self._settle()

    def _settle(self) -> None:
        """Say where the text stands: it may be anywhere."""
        begun = self._begins is not None and not self.ended and not self._may_open
        self.state = self._states[-1] if begun and not self._crowded else None
        short = self.num_tokens < self._min_tokens
        self.places = self._places_while_short if short else self._places_then

    @property
    def _may_open(self) -> bool:
        """The next token says whether the grammar has begun."""
        return self.num_tokens == 0 and self._opened_by is not None

    @property
    def _crowded(self) -> bool:
        return self._in_a_row >= MOST and self._spaces is not None

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
        self._settle()
        return self.num_tokens - known

    def follow(self, token: int, known: int) -> bool:
        """:meth:`take` one token, if that does not end the text and the automaton takes it, as
        nearly always. False: nothing was done."""
        before, automaton = self.state, self.automaton
        if (
            before is None
            or automaton is None
            or self.num_tokens != known
            or token in self._held
            or known + 1 == self._min_tokens
        ):
            return False
        after = automaton.walk(before, token)
        if after is None:
            return False
        self.num_tokens = known + 1
        self._tokens.append(token)
        self._states.append(after)
        more = self._blanks.get(token)
        if more is None:
            self._in_a_row, self.state = 0, after
        else:
            self._in_a_row += more
            self.state = None if self._crowded else after
        return True

    def _accept(self, token: int) -> bool:
        if self._may_open and token == self._opened_by:
            self._begins = None
        if self._begins is None:
            self.num_tokens += 1
            if token == self._begin_after:
                self._begins = self.num_tokens
            return True
        automaton, before = self.automaton, self._states[-1]
        after = None
        if automaton is not None and before is not None:
            after = automaton.walk(before, token)
        if after is None:
            matcher = self._asked()
            if matcher is None or not matcher.accept_token(token):
                return False
            self._followed += 1
            if automaton is not None and before is not None:
                automaton.give_up("xgrammar takes a token that does not follow it")
        self.num_tokens += 1
        self._tokens.append(token)
        self._states.append(after)
        if token in self._held:
            self.ended = self._matcher.is_terminated() if after is None else after.terminated
        more = self._blanks.get(token)
        self._in_a_row = 0 if more is None else self._in_a_row + more
        return True

    def catch_up(self, most: int) -> bool:
        """Have xgrammar follow up to so many of the tokens that it has not; whether none is left,
        or it refuses the next one."""
        for token in self._tokens[self._followed : self._followed + most]:
            if self._refused:
                break
            if self._matcher.accept_token(token):
                self._followed += 1
                continue
            self._refused = True
            if self.automaton is not None:
                self.automaton.give_up("xgrammar refuses a token that follows it")
        return self._refused or self._followed == len(self._tokens)

    def _asked(self) -> Any | None:
        """The matcher behind all tokens; None: it refuses one of them."""
        self.catch_up(len(self._tokens))
        return None if self._refused else self._matcher

    def _take_back(self, known: int) -> None:
        """Forget what was taken behind the first ``known`` tokens."""
        count = self.num_tokens - known
        if count <= 0:
            return
        if self._begins is not None:
            left = max(0, known - self._begins)
            if self._followed > left:
                self._matcher.rollback(self._followed - left)
                self._followed = left
            del self._tokens[left:], self._states[left + 1 :]
            self.ended = self._refused = False
            self._in_a_row = 0
            for token in reversed(self._tokens):
                more = self._blanks.get(token)
                if more is None:
                    break
                self._in_a_row += more
            if self._begin_after is not None and known < self._begins:
                self._begins = None
        self.num_tokens = known
        if self._may_open:
            self._begins = 0

    def fill(self, masks: MaskTable, drafts: Sequence[int] = ()) -> list[int]:
        """Which tokens may come next, and which behind each of the drafts. All may where the
        grammar has not begun, and where none may: that token is refused whatever it is.

        Args:
            masks: The step's.
            drafts: Up to K tokens; -1 and what follows is none.

        Returns:
            The places of the masks, of the next token's and then of the drafts'.
        """
        if self.ended:
            return []
        if not drafts:
            return [self.mask(masks)]
        places, before = [], self.num_tokens
        for draft in (*drafts, -1):
            places.append(self.mask(masks, later=False))
            if draft < 0 or not self._accept(draft) or self.ended:
                break
        self._take_back(before)
        self._settle()
        return places

    def mask(self, masks: MaskTable, *, later: bool = True) -> int:
        """The place of what may come next, of a text that has not ended.

        Args:
            masks: The step's.
            later: No token is taken until they are settled.
        """
        if self._begins is None:
            return masks.of_all()
        if self._masks is not masks:
            self.keep_in(masks)
        if self._opened_by is not None and self._may_open:
            return masks.and_also(self._opened_by, self._fill(masks, None, later=False))
        key = self._key(masks)
        if key is not None:
            place = masks.kept(key, self)
            if place is not None:
                return place
        return self._fill(masks, key, later=later)

    def filled(self, masks: MaskTable) -> int:
        """As :meth:`mask`, of one that is filled though it may be kept."""
        return self._fill(masks, self._key(masks), later=True)

    def _key(self, masks: MaskTable) -> Key | None:
        """All that the mask follows from; None: nobody knows."""
        state = self._states[-1]
        if state is None or self.automaton is None or not self.automaton.followed:
            return None
        return masks.places_of(*self._beside()), state

    def _beside(self) -> tuple[Others, Crowded | None]:
        """What the mask follows from beside a state."""
        others = self._others if self.num_tokens < self._min_tokens else ()
        if self._crowded and self._spaces is not None:
            return others, (self._spaces, self._spaces.turn(self._in_a_row))
        return others, None

    def _fill(self, masks: MaskTable, key: Key | None, *, later: bool) -> int:
        return masks.fill(key, self._asked(), *self._beside(), later=later)


@functools.lru_cache(maxsize=64)
def _others(tokens: frozenset[int]) -> Others:
    """Of a mask's words that have any of the tokens, the bits of all others."""
    words = sorted({token // 32 for token in tokens})
    bits = np.zeros(len(words), dtype=np.uint32)
    for token in tokens:
        bits[words.index(token // 32)] |= np.uint32(1 << token % 32)
    return tuple(zip(words, (~bits.view(np.int32)).tolist(), strict=True))
