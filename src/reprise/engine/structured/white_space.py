"""A bound on the white space that a model writes between the parts of JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Words = np.ndarray[Any, Any]

MOST = 16
"""Characters in a row, in tokens of nothing else: behind so many no such token comes. Models that
are lost write them without end; an indentation is a token or two, and the last may go beyond."""
_SPACES = b" \t\n\r"
_TURNS = b"\n \t\r"
TURN = 8
"""Characters of one kind in a row, where white space has to come that is not known."""
_ROUND = math.lcm(*range(1, len(_TURNS) + 1))
"""Turns behind which they come again, whichever kinds may."""
_OPENINGS = frozenset(b'{}[]",:-0123456789.+eEtfnrualsNI')
"""What numbers and names in JSON are made of, and the signs between its parts."""
_MUCH = re.compile(rf"[ \t\n\r]{{{MOST}}}")
_PARTS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|.", re.DOTALL)
"""Of a regular expression: classes and characters."""
_NAMES = re.compile(r"[ \t\n\r]|\\[sWtnrfvxuc0]")
_SAID = ("description", "title", "default", "examples", "$comment")
"""What a schema says to its readers."""


def _names(expression: str) -> bool:
    """Whether it names white space, but in a class that has all letters: there the sign tells."""
    for part in _PARTS.findall(expression):
        if part.startswith("[^"):
            given = re.sub(r"\\[^wSxuc]", "", part)
            if re.search("[A-Za-z]", given):
                return True
        elif _NAMES.search(part) and not (part[0] == "[" and re.search(r"\\[SDw]", part)):
            return True
    return False


def named_by(document: Any) -> bool:
    """Whether a schema or a structural tag asks for white space in texts of its own, which need not
    be between parts: in expressions that name it, in grammars, or so much of it in a given text."""
    if isinstance(document, str):
        return _MUCH.search(document) is not None
    if isinstance(document, list):
        return any(map(named_by, document))
    if not isinstance(document, Mapping):
        return False
    for name, each in document.items():
        expressions = each if name in ("pattern", "patternProperties") else ()
        if isinstance(expressions, str):
            expressions = (expressions,)
        if isinstance(expressions, Mapping | tuple) and any(map(_names, expressions)):
            return True
        if name == "grammar" and isinstance(each, str):
            return True
        told = name in _SAID and not isinstance(each, Mapping)
        if named_by(name) or (not told and named_by(each)):
            return True
    return False


@dataclass(frozen=True, eq=False)
class WhiteSpace:
    """Which tokens of a vocabulary are white space alone.

    xgrammar can count white space too, and looks at each token that begins with it whenever it
    makes a mask; without a bound it knows them all beforehand. So it is counted here, where a mask
    costs nothing before the bound is reached.
    """

    lengths: Mapping[int, int]
    """Characters of each such token."""
    others: Words
    """[ceil(V / 32)] int32, a mask of all other tokens."""
    turns: tuple[int, ...]
    """Tokens of one character of it, a kind each."""
    sign: int | None
    """A token that is allowed within any text, and where white space stands between parts is not;
    None: there is none."""

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> WhiteSpace:
        """Find it in the texts of a vocabulary's tokens."""
        lengths = {n: len(each) for n, each in enumerate(texts) if each and not each.strip(_SPACES)}
        words = np.full(-(-len(texts) // 32), 0xFFFFFFFF, dtype=np.uint32)
        for token in lengths:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        letters = (
            n for n, each in enumerate(texts)
            if len(each) == 1 and each.isalpha() and each[0] not in _OPENINGS
        )  # fmt: skip
        alone = {each: number for number, each in enumerate(texts) if len(each) == 1}
        turns = tuple(alone[each] for kind in _TURNS if (each := bytes((kind,))) in alone)
        return cls(lengths, words.view(np.int32), turns, next(letters, None))

    @staticmethod
    def turn(length: int) -> int:
        """What :meth:`limit` has to know of how many characters of it come before."""
        return (length - MOST) // TURN % _ROUND

    def limit(self, mask: Words, turn: int) -> None:
        """Allow no more of it in a mask, unless there is nothing else, or within a text.

        Where nothing else may come, a text that begins with white space follows, and only the
        grammar knows which: kinds take turns, so that a line's end and an indentation come, behind
        which the rest of that text may.

        Args:
            mask: [ceil(V / 32)] int32, changed in place.
            turn: As :meth:`turn` says.
        """
        sign = self.sign
        if sign is not None and mask[sign // 32] >> sign % 32 & 1:
            return
        kept = mask & self.others
        if kept.any():
            mask[:] = kept
            return
        turns = [each for each in self.turns if mask[each // 32] >> each % 32 & 1]
        if turns:
            token = turns[turn % len(turns)]
            mask[:] = 0
            mask[token // 32] = np.uint32(1 << token % 32).view(np.int32)
