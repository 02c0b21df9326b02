"""From token ids to text, a token at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from reprise.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"

UNFINISHED = 3
"""Most bytes that a character can have while another one is still to come. Decoders show them as
one replacement character or as one for each byte."""

LONGEST = 16
"""Tokens that wait for their text to settle; behind so many, the first ones have."""

CONTEXTS = (4, 8, 16, 32, 64)
"""Numbers of a prompt's last tokens that may be needed to decode what follows."""

_UNKNOWN: Any = object()


class TokenTexts:
    """The texts of a tokenizer's ids, as its own decoder gives them.

    Args:
        tokenizer: transformers' tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            self._special = frozenset(tokenizer.all_special_ids)
        else:
            added = self._backend.get_added_tokens_decoder()
            self._special = frozenset(each for each, token in added.items() if token.special)
        self._anchor = self._find_anchor()
        self._anchor_text = self.decode(self._anchor, False)
        self._alone: dict[int, str] = {}
        self._joins = type(getattr(self._backend, "decoder", None)).__name__ == "ByteLevel"
        """A text's bytes are those of its tokens, side by side."""
        self._whole: tuple[dict[int, str | None], ...] = ({}, {})
        """Answers of :meth:`whole`, by token; with special tokens, and without."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def is_silent(self, token: int, skip_special_tokens: bool) -> bool:
        """The decoder never sees this token: texts are as if it were not there."""
        if skip_special_tokens and token in self._special:
            return True
        # A model's vocabulary may be padded beyond the tokenizer's.
        return self._backend is not None and self._backend.id_to_token(token) is None

    def whole(self, token: int, skip_special_tokens: bool) -> str | None:
        """What this token adds to any text at a character's end: characters that are whole. None:
        that depends on others, or it has no such text."""
        known = self._whole[skip_special_tokens]
        text = known.get(token, _UNKNOWN)
        if text is _UNKNOWN:
            # Of a token that is silent the decoder makes no text. Each is asked for once, and of a
            # vocabulary that is drawn from at random each step has new ones.
            text = ""
            if self._joins and self._backend is not None:
                text = self._backend.decode((token,), skip_special_tokens=skip_special_tokens)
            known[token] = text = text if text and REPLACEMENT not in text else None
        return text

    def known(self, skip_special_tokens: bool) -> Mapping[int, str | None]:
        """What :meth:`whole` has said so far, by token."""
        return self._whole[skip_special_tokens]

    def of(self, token: int) -> str:
        """A token's text within a text; a replacement character for a part of a character.

        Decoders drop the space that the first word of a text begins with.
        """
        text = self._alone.get(token)
        if text is None:
            text = self.decode([*self._anchor, token], False)
            if text.startswith(self._anchor_text):
                text = text[len(self._anchor_text) :]
            else:
                text = self.decode([token], False)
            self._alone[token] = text
        return text

    def _find_anchor(self) -> list[int]:
        """A token with a text of its own that begins a text."""
        for letter in "aA0":
            for token in self._tokenizer.encode(letter, add_special_tokens=False)[-1:]:
                if token not in self._special and self.decode([token], False).strip() == letter:
                    return [token]
        return []


class _StopStrings:
    """Finds the first of many texts in a text that grows: what is looked up is a part of that text,
    so that it takes as long for thousands as for a few.

    Args:
        stops: The texts.
    """

    __slots__ = ("_ends", "_lengths", "_stops", "longest")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = frozenset(stops)
        self._ends = frozenset(each[-1] for each in stops)
        self._lengths = sorted({len(each) for each in stops}, reverse=True)
        self.longest = self._lengths[0] if stops else 0

    def first(self, text: str, known: int) -> tuple[int, int] | None:
        """Where the stop string that is complete first begins and ends; of two that are complete at
        once the longer one, so that nothing of it is shown. None: none ends behind ``known``.

        Args:
            text: So far.
            known: Characters of it in which none ends.
        """
        for end in range(known + 1, len(text) + 1):
            if text[end - 1] not in self._ends:
                continue
            for length in self._lengths:
                if length <= end and text[end - length : end] in self._stops:
                    return end - length, end
        return None


@functools.lru_cache(maxsize=4)  # all completions of a prompt have the same
def _finder(stops: tuple[str, ...]) -> _StopStrings:
    return _StopStrings(stops)


class Detokenizer:
    """The growing text of one completion: what the tokenizer makes of all its ids behind those of
    the prompt. Characters come out when they are whole, and stop strings are found.

    Decoders of byte tokens (``<0xE6>``) spoil a whole run of them for one that does not fit.
    Characters that have come out already stay as they are.

    Args:
        texts: Of the tokenizer.
        prompt_token_ids: Of the request; its last tokens are context of the first new one.
        params: Of the request.
    """

    def __init__(
        self, texts: TokenTexts, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self.text = ""
        self._texts = texts
        self._params = params
        self._skip_special = params.skip_special_tokens
        self._known = texts.known(self._skip_special)
        self._num_tokens = 0
        """Tokens that :meth:`append` was given."""
        self._newest: int | None = None
        """A whole token behind the context, and its text: all that is needed of what came before
        it. None: there is none."""
        self._newest_text = ""
        self._context: list[int] = []
        """Tokens whose text is out, or is the prompt's: decoded along, since a token's text can
        depend on its predecessors."""
        self._context_text = ""
        self._pending: list[int] = []
        """The tokens behind it."""
        self._num_out = 0
        """Characters of theirs that are out."""
        self._unsure = ""
        """The rest of their text: replacement characters, which may become others."""
        self._prompt: Sequence[int] | None = prompt_token_ids
        """Until the context is other tokens; most texts never need the prompt's."""
        self._stops = params.stop_strings
        self._find_stop = _finder(self._stops)
        self._held_back = 0
        if self._stops and not params.include_stop_str_in_output:
            self._held_back = self._find_stop.longest - 1

    def add(self, token: int) -> bool:
        """:meth:`append` one token, if it is whole characters and no stop string is looked for, as
        mostly: in a third of the time. False: nothing was done."""
        if self._pending or self._stops:
            return False
        text = self._known.get(token) or self._texts.whole(token, self._skip_special)
        if text is None:
            return False
        self._newest, self._newest_text = token, text
        self.text += text
        return True

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Add tokens. Returns the stop string that the text now contains, with the text cut there,
        or None."""
        for token_id in token_ids:
            self._num_tokens += 1
            text = None if self._pending else self._texts.whole(token_id, self._skip_special)
            if text is not None:
                self._newest, self._newest_text = token_id, text
                found = self._take(text)
                if found is not None:
                    return found
                continue
            if self._texts.is_silent(token_id, self._skip_special):
                continue
            found = self._take(self._next_characters(token_id))
            if found is not None:
                return found
        return None

    def finish(self) -> str | None:
        """No token follows: what looks like the beginning of a character is out as it is. Returns
        as :meth:`append` does."""
        unsure, self._unsure = self._unsure, ""
        return self._take(unsure)

    def stable_length(self, finished: bool) -> int:
        """Characters of ``text`` that no stop string can take back any more."""
        return len(self.text) if finished else max(0, len(self.text) - self._held_back)

    def _begin(self, prompt: Sequence[int]) -> None:
        """Make the prompt's end the context: enough of it to begin with a whole character."""
        seen = (each for each in reversed(prompt) if not self._is_silent(each))
        last = list(itertools.islice(seen, CONTEXTS[-1]))[::-1]
        for count in CONTEXTS:
            self._context = last[-count:]
            self._context_text = self._decode(self._context)
            if self._context_text and not self._context_text.startswith(REPLACEMENT):
                return

    def _next_characters(self, token_id: int) -> str:
        """The characters that this token completes."""
        if self._newest is not None:
            self._context, self._context_text = [self._newest], self._newest_text
            self._newest = self._prompt = None
        elif self._prompt is not None:
            self._begin(self._prompt)
            self._prompt = None
        self._pending.append(token_id)
        text = self._pending_text()
        whole = text.rstrip(REPLACEMENT)
        settled = max(len(whole), self._sure(text), self._num_out)
        added, self._unsure = text[self._num_out : settled], text[settled:]
        self._num_out = settled
        if added and not self._unsure:
            self._advance(text)
        elif len(self._pending) > LONGEST:
            added += self._advance_within_pending()
        return added

    def _sure(self, text: str) -> int:
        """How many of the characters no further token changes.

        Those that the text has without its last tokens too, which may begin a character: a whole
        U+FFFD before them is three replacement characters until they are whole.
        """
        if len(text) <= UNFINISHED:
            return 0
        shorter = [self._pending_text(without=each) for each in range(1, UNFINISHED + 1)]
        agreed = itertools.takewhile(
            lambda letters: len(set(letters)) == 1, zip(text, *shorter, strict=False)
        )
        return min(len(text) - UNFINISHED, sum(1 for _ in agreed))

    def _pending_text(self, without: int = 0) -> str:
        """What the pending tokens, but for the last ones, add to the text of the context."""
        pending = self._pending[: len(self._pending) - without]
        before, text = self._context_text, self._decode(self._context + pending)
        if text.startswith(before):
            return text[len(before) :]
        pairs = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(before, text, strict=False)
        )
        common = sum(1 for _ in pairs)
        if not before[common:].strip(REPLACEMENT):
            return text[common:]  # they complete a character that the context began
        return self._decode(pending)  # they spoil the context's run of bytes

    def _advance(self, text: str) -> None:
        """The pending tokens, whose text is out, become the context."""
        context, self._pending, self._num_out = self._pending, [], 0
        context_text = self._decode(context)
        if context_text.count(REPLACEMENT) != text.count(REPLACEMENT):
            # They begin within a character.
            context = (self._context + context)[-CONTEXTS[-1] :]
            context_text = self._decode(context)
        self._context, self._context_text = context, context_text

    def _advance_within_pending(self) -> str:
        """Likewise for the first ones of tokens that do not settle; returns what comes out."""
        keep = UNFINISHED + 1
        self._context = self._pending[:-keep][-2 * keep :]
        self._context_text = self._decode(self._context)
        self._pending = self._pending[-keep:]
        text = self._pending_text()
        self._num_out = len(text) - len(self._unsure)
        if self._num_out >= 0 and text.endswith(self._unsure):
            return ""
        out, self._unsure, self._num_out = self._unsure, "", len(text)
        return out

    def _take(self, added: str) -> str | None:
        """Add characters to the text, and look for the stop string that is complete first."""
        self.text += added
        if not self._stops or not added or self._num_tokens < self._params.min_tokens:
            return None
        found = self._find_stop.first(self.text, len(self.text) - len(added))
        if found is None:
            return None
        begin, end = found
        stop = self.text[begin:end]
        self.text = self.text[: end if self._params.include_stop_str_in_output else begin]
        self._unsure = ""
        return stop

    def _decode(self, ids: list[int]) -> str:
        return self._texts.decode(ids, self._skip_special)

    def _is_silent(self, token: int) -> bool:
        return self._texts.is_silent(token, self._skip_special)
