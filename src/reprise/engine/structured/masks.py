"""The masks of a step, of which most have been made for another one."""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from reprise.engine.structured.automaton import Automaton, State
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
KEPT = 512
"""Masks that are kept, of 19 kB each with a vocabulary of 150,000: those that came first go first,
and no text has more than a few states that come again."""
LEAST = 64
"""Rows of a step that there is room for at first: page-locked memory takes milliseconds to get."""
CHECKED = 1024
"""Of so many masks that are there one is filled all the same, and compared: xgrammar follows all
tokens of that text for it."""
FOLLOWED = 16
"""Tokens that it follows in a step for that, a microsecond or more each; the next steps' masks of a
text that has more are not looked at until it has caught up: behind long texts that is in every step
then."""
GAP = 4
"""Masks between two that are to be sent up to which one copy takes all."""

Ints = np.ndarray[Any, Any]
Crowded = tuple[WhiteSpace, int]
"""What white space is, and whose turn it is where nothing else may come."""
Others = tuple[tuple[int, int], ...]
"""All tokens but some: of each word of a mask that has such tokens, its number and the bits of all
others."""


class Places(dict[Hashable, int]):
    """Where masks are kept, by the state of a grammar that they follow from, and nothing else."""

    __slots__ = ("__weakref__",)


Key = tuple[Places, Hashable]
"""All that a mask follows from, and where its place is found: by the hash of a state alone."""


class Text(Protocol):
    """Whose masks these are."""

    state: State | None
    automaton: Automaton | None
    places: Places
    """Has the place of its mask by its state, if that is kept."""

    def mask(self, masks: MaskTable) -> int:
        """The place of its mask."""

    def filled(self, masks: MaskTable) -> int:
        """The place of its mask, which is filled though it may be kept."""

    def catch_up(self, most: int) -> bool:
        """Have xgrammar follow up to so many of the tokens that it has not; whether none is
        left."""


ALL = "all"
"""The key of a mask that allows any token."""


class MaskTable:
    """An engine's masks, each at a place of memory: those that a state of a grammar has, which stay
    there for all texts that come to it, and behind them those of one step.

    What is written in one step has to be on the device, or elsewhere, when the next one begins.

    Args:
        vocab_size: Of the logits.
        pinned: The memory is page-locked.
    """

    def __init__(self, vocab_size: int, *, pinned: bool = False) -> None:
        self._width, self._pinned = -(-vocab_size // 32), pinned
        self._keeps, self.num_kept = True, 0
        self._step = self._oldest = 0
        self._next_check = CHECKED
        """Of the masks that are there, by number."""
        self._checked: tuple[Text, int] | None = None
        """The text that xgrammar catches up with for it, and the step in which it has last."""
        self._asked = [0] * KEPT
        """The step that each was in last."""
        self._places: weakref.WeakValueDictionary[Hashable, Places] = weakref.WeakValueDictionary()
        """By what a mask follows from beside a state."""
        self._of_all = Places()
        """Of the mask by which any token may come."""
        self._keys: list[Key | None] = [None] * KEPT
        self._tensor = torch.empty((0, self._width), dtype=torch.int32)
        self._words: Words = self._tensor.numpy()
        self._which: Ints = np.empty(0, dtype=np.int64)
        """In which the step's places are sent."""
        self.forget()
        self.begin(0)

    def __len__(self) -> int:
        """Places."""
        return len(self._words)

    def begin(self, rows: int) -> None:
        """A step has so many masks at most."""
        if rows and KEPT + 1 + rows > len(self._words):
            beside = max(LEAST, 1 << (rows - 1).bit_length())
            size = (KEPT + 1 + beside, self._width)
            self._tensor = torch.empty(size, dtype=torch.int32, pin_memory=self._pinned)
            self._words = self._tensor.numpy()
            self.forget()
        if self._checked is not None and self._checked[1] != self._step:
            self._checked, self._next_check = None, self.num_kept  # it has ended: another one
        self._step += 1
        self._next = KEPT
        self._changed: list[int] = []
        """Places that are written in this step."""
        self._later: tuple[list[int], list[Any]] = [], []
        """Places that are yet to be filled, and their matchers."""
        self._others: dict[Others, list[int]] = {}
        self._crowded: dict[int, Crowded] = {}
        self._doubted: tuple[int, int] | None = None
        """The mask that was kept, and is filled all the same, and where to."""

    def forget(self) -> None:
        """No mask is what it should be: a step was lost, maybe while they were filled."""
        self._forget_keys()
        self._sent = bytearray(len(self._words))
        """Which were given out as they are."""

    def _forget_keys(self) -> None:
        for key in self._keys:
            if key is not None:
                key[0].clear()
        self._keys = [None] * KEPT

    def send_again(self) -> None:
        """What was given out is free again."""
        self._sent = bytearray(len(self._words))

    def places_of(self, others: Others, crowded: Crowded | None) -> Places:
        """Of masks that follow from these, as :meth:`fill` has them, and a state: the same object
        as long as anybody has it."""
        found = self._places.get((others, crowded))
        if found is None:
            found = self._places[others, crowded] = Places()
        return found

    def of_all(self) -> int:
        """The place of a mask by which any token may come."""
        place = self._of_all.get(ALL)
        if place is None:
            place = self._place((self._of_all, ALL))
            self._words[place] = -1
        else:
            self._asked[place] = self._step
        return place

    def kept(self, key: Key, text: Text) -> int | None:
        """The place of a mask by all that it follows from; None: it has to be filled, maybe since
        it is one that is checked."""
        place = key[0].get(key[1])
        if place is None:
            return None
        self._asked[place] = self._step
        self.num_kept += 1
        return None if self._to_check([text]) == 0 else place

    def of(self, texts: Sequence[Text]) -> list[int]:
        """The places of what may come next in texts of which none has ended; no token is taken
        until they are settled. Most are kept, and cost a look each."""
        places: list[Any] = []
        for each in texts:
            state, automaton = each.state, each.automaton
            known = state is not None and automaton is not None and automaton.followed
            places.append(each.places.get(state) if known else None)
        step, asked = self._step, self._asked
        there = set(places)
        missing = None in there
        there.discard(None)
        for place in there:  # before any other is filled, which takes the place of an older one
            asked[place] = step
        kept = texts
        if missing:
            kept = [text for text, place in zip(texts, places, strict=True) if place is not None]
        self.num_kept += len(kept)
        number = self._to_check(kept)
        if number is not None:
            text = kept[number]
            places[texts.index(text)] = text.filled(self)
        if missing:
            for number, place in enumerate(places):
                if place is None:
                    places[number] = texts[number].mask(self)
        return places

    def _to_check(self, texts: Sequence[Text]) -> int | None:
        """Which of the texts, whose masks are kept and counted, has its own filled all the same."""
        if self._checked is None:
            beyond = self.num_kept - self._next_check
            if beyond < 0 or self._doubted is not None or not texts:
                return None
            begun = texts[max(0, len(texts) - 1 - beyond)]
            self._checked, self._next_check = (begun, self._step), self.num_kept + CHECKED
        text = self._checked[0]
        if text not in texts:
            return None
        if text.catch_up(FOLLOWED):
            self._checked = None
            return texts.index(text)
        self._checked = text, self._step
        return None

    def fill(
        self,
        key: Key | None,
        matcher: Any,
        others: Others,
        crowded: Crowded | None,
        *,
        later: bool,
    ) -> int:
        """The place of a mask that :meth:`kept` does not have.

        Args:
            key: All that it follows from; None: nobody knows.
            matcher: xgrammar's, which allows what may come; None: anything may.
            others: Some tokens may come only where nothing else may.
            crowded: No more white space may come; None: it may.
            later: The matcher stays as it is until the masks are settled.
        """
        if matcher is None:
            return self.of_all()
        kept = None if key is None else key[0].get(key[1])
        place = self._place(key if kept is None and self._keeps else None)
        if kept is not None:
            self._doubted = kept, place
        if later:
            self._later[0].append(place)
            self._later[1].append(matcher)
        else:
            matcher.fill_next_token_bitmask(self._tensor, place)
        if others:
            self._others.setdefault(others, []).append(place)
        if crowded is not None:
            self._crowded[place] = crowded
        return place

    def and_also(self, token: int, place: int) -> int:
        """Let one more token come by a mask of this step alone, which is filled, at this place."""
        words = self._words[place].view(np.uint32)
        words[token // 32] |= np.uint32(1 << token % 32)
        return place

    def _place(self, key: Key | None) -> int:
        """A place to write to, where the mask stays if it may come again."""
        free = None if key is None else self._free()
        if free is None or key is None:
            place = self._next
            self._next += 1
        else:
            place = free
            old = self._keys[place]
            if old is not None:
                del old[0][old[1]]
            self._keys[place] = key
            key[0][key[1]] = place
            self._asked[place] = self._step
        self._changed.append(place)
        return place

    def _free(self) -> int | None:
        """The one of the masks that are kept that came first, and that the step has not."""
        for _ in range(KEPT):
            place, self._oldest = self._oldest, (self._oldest + 1) % KEPT
            if self._asked[place] != self._step:
                return place
        return None

    def which(self, places: Sequence[int]) -> Ints:
        """[N] int64, a place for each row of a step, -1 for none, in memory from which a device
        copies. It is valid as long as the masks are."""
        count = len(places)
        if count > len(self._which):
            room = max(LEAST, 1 << (count - 1).bit_length())
            memory = torch.empty(room, dtype=torch.int64, pin_memory=self._pinned)
            self._which = memory.numpy()
        found = self._which[:count]
        found[:] = places
        return found

    def settle(self, places: Iterable[int]) -> list[tuple[int, Words]]:
        """The step's masks that were not given out yet.

        Args:
            places: Of the step's masks.

        Returns:
            Of neighbours the first one's place, and [C, ceil(V / 32)] int32, all of which allow
            something.
        """
        self._fill()
        for place, (spaces, turn) in self._crowded.items():
            spaces.limit(self._words[place], turn)
        for others, held in self._others.items():
            self._hold_back(others, held)
        changed = self._changed
        if changed:
            for number in _first_empty(self._words[changed, :FIRST]):
                if not self._words[changed[number]].any():
                    self._words[changed[number]] = -1
            for place in changed:
                self._sent[place] = 0
        self._compare()
        sent = self._sent
        fresh = sorted(place for place in set(places) if not sent[place])
        found: list[tuple[int, Words]] = []
        while fresh:
            count = 1
            while count < len(fresh) and fresh[count] - fresh[count - 1] <= GAP:
                count += 1
            found.append((fresh[0], self._words[fresh[0] : fresh[count - 1] + 1]))
            for place in fresh[:count]:
                sent[place] = 1
            del fresh[:count]
        return found

    def _compare(self) -> None:
        """Compare a kept mask with a new one; if they differ, keep none from now on."""
        if self._doubted is None:
            return
        kept, filled = self._doubted
        if self._keeps and not np.array_equal(self._words[kept], self._words[filled]):
            logger.error(
                "xgrammar has filled two masks for one state of a grammar: masks are filled for "
                "each step from now on; please report this, with its version"
            )
            self._keeps = False
            self._forget_keys()

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
        """Fill the masks that were left for later: a few by this thread, and if they take long, the
        others by several."""
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
        """What fills masks in the thread that asks, and what does in threads of its own. One
        engine's: where two threads ask the same batch of xgrammar's at once, the end of the one's
        work ends the process."""
        import xgrammar

        several = min(THREADS, max(1, usable_cpus()[0] // 2))
        alone, together = (xgrammar.BatchGrammarMatcher(max_threads=n) for n in (1, several))
        return alone, together


def _first_empty(words: Words) -> list[int]:
    """Of which masks these first words allow nothing."""
    return np.flatnonzero(~words.any(axis=1)).tolist()
