"""A bound on the white space that a model writes between the parts of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Words = np.ndarray[Any, Any]

MOST = 16
"""Characters in a row, in tokens of nothing else: behind so many no such token comes. Models that
are lost write them without end; an indentation is a token or two, and the last may go beyond."""
_SPACES = b" \t\n\r"
_OPENINGS = frozenset(b'{}[]",:-0123456789.+eEtfnrualsNI')
"""What numbers and names in JSON are made of, and the signs between its parts."""


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
    sign: int | None
    """A token that is allowed within any text, and where white space stands between parts is not;
    None: there is none."""

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> WhiteSpace:
        """Of the texts of a vocabulary's tokens."""
        lengths = {n: len(each) for n, each in enumerate(texts) if each and not each.strip(_SPACES)}
        words = np.full(-(-len(texts) // 32), 0xFFFFFFFF, dtype=np.uint32)
        for token in lengths:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        letters = (
            n for n, each in enumerate(texts)
            if len(each) == 1 and each.isalpha() and each[0] not in _OPENINGS
        )  # fmt: skip
        return cls(lengths, words.view(np.int32), next(letters, None))

    def limit(self, mask: Words) -> None:
        """Allow no more of it in a mask, unless there is nothing else, or within a text."""
        sign = self.sign
        if sign is not None and mask[sign // 32] >> sign % 32 & 1:
            return
        kept = mask & self.others
        if kept.any():
            mask[:] = kept
