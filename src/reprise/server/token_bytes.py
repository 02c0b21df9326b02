"""The bytes of single tokens, of which some are parts of characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reprise.engine.detokenizer import TokenTexts

REPLACEMENT = "\ufffd"


class TokenBytes:
    """Texts and bytes of a tokenizer's ids.

    Args:
        tokenizer: transformers' tokenizer; None: there is none, and tokens have no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = _byte_alphabet()
        self._texts = None if tokenizer is None else TokenTexts(tokenizer)
        self._sizes: dict[tuple[int, bool], int] = {}

    def text(self, ids: Sequence[int]) -> str:
        """The text of a prompt that was given as ids."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def size(self, token: int, skip_special_tokens: bool) -> int:
        """Bytes (UTF-8) that a token adds to a text."""
        found = self._sizes.get((token, skip_special_tokens))
        if found is None:
            found = 0
            if self._texts is not None and not self._texts.is_silent(token, skip_special_tokens):
                text, pieces = self.of(token, self._texts.of(token))
                found = len(text.encode() if pieces is None else pieces)
            self._sizes[token, skip_special_tokens] = found
        return found

    def of(self, token: int, text: str | None) -> tuple[str, list[int] | None]:
        """A token's text, and its bytes where they are not those of the text: it is a part of a
        character.

        Args:
            token: Its id.
            text: As the engine shows it.
        """
        if text is None:
            return "", None
        if REPLACEMENT not in text or self._tokenizer is None:
            return text, None
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return text, None
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return text, [int(piece[3:5], 16)]
        if all(each in self._bytes_of for each in piece):
            return text, [self._bytes_of[each] for each in piece]
        return text, None


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies (GPT-2's and later ones) write each byte as:
    printable ones of Latin-1 as they are, the others from U+0100 on in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in printable]
    found = {chr(each): each for each in printable}
    found.update({chr(256 + place): each for place, each in enumerate(others)})
    return found
