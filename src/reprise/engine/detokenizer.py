"""From token ids to text, a token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reprise.sampling_params import SamplingParams

CONTEXT_TOKENS = 6
"""Prompt tokens that are decoded along, since a token's text can depend on its predecessors."""

PATIENCE = 8
"""Tokens without a whole character after which what there is is emitted as it is."""

REPLACEMENT = "\ufffd"


def fast_decoder(tokenizer: Any, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """The quickest way to turn ids into text that this tokenizer has."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


class Detokenizer:
    """The growing text of one completion. Emits whole characters only, and finds stop strings.

    Args:
        tokenizer: transformers' tokenizer.
        prompt_token_ids: Of the request; its last tokens are context of the first new one.
        params: Of the request.
    """

    def __init__(
        self, tokenizer: Any, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self.text = ""
        self._decode = fast_decoder(tokenizer, params.skip_special_tokens)
        self._params = params
        self._num_tokens = 0
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        """Tokens that are decoded together: text before them cannot change any more."""
        self._num_context = len(self._window)
        """The first tokens of the window: their text is part of ``text`` or of the prompt."""
        self._num_emitted = len(self._decode(self._window))
        """The first characters of the window's text: likewise."""
        self._num_stalled = 0
        stops = params.stop_strings
        self._held_back = 0
        if stops and not params.include_stop_str_in_output:
            self._held_back = max(map(len, stops)) - 1

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Add tokens. Returns the stop string that the text now contains, with the text cut there,
        or None."""
        for token_id in token_ids:
            self._num_tokens += 1
            added = self._next_characters(token_id)
            if not added:
                continue
            self.text += added
            if self._num_tokens >= self._params.min_tokens:
                found = self._find_stop(len(added))
                if found is not None:
                    return found
        return None

    def _next_characters(self, token_id: int) -> str:
        """The characters that this token completes."""
        window = self._window
        window.append(token_id)
        text = self._decode(window)
        whole = text.rstrip(REPLACEMENT)
        if len(whole) < len(text) and self._num_stalled < PATIENCE:
            # A character whose other bytes are still to come looks like an invalid one.
            added = whole[self._num_emitted :]
            self._num_emitted += len(added)
            self._num_stalled = 0 if added else self._num_stalled + 1
            return added
        added = text[self._num_emitted :]
        if not added and len(window) == self._num_context + 1:
            window.pop()  # a special token: invisible, and no context for what follows
            return ""
        self._window = window[self._num_context :]
        self._num_context = len(self._window)
        self._num_emitted = len(self._decode(self._window))
        self._num_stalled = 0
        return added

    def stable_length(self, finished: bool) -> int:
        """Characters of ``text`` that no stop string can take back any more."""
        return len(self.text) if finished else max(0, len(self.text) - self._held_back)

    def _find_stop(self, num_new: int) -> str | None:
        """The stop string that begins first in the text that the new characters complete."""
        first, found = len(self.text), None
        for stop in self._params.stop_strings:
            begin = self.text.find(stop, max(0, len(self.text) - num_new - len(stop) + 1))
            if begin != -1 and begin < first:
                first, found = begin, stop
        if found is not None:
            keep = len(found) if self._params.include_stop_str_in_output else 0
            self.text = self.text[: first + keep]
        return found
