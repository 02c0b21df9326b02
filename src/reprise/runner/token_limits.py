"""Tokens that a request may draw: ``allowed_token_ids`` and ``bad_words``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reprise.platforms import Platform
from reprise.runner.arena import Ints, to_device
from reprise.runner.row_state import Draw, RowState
from reprise.step import Admission

BAD = -1e30
"""Added to the logit of a bad word's last token. It is finite: where all that is allowed is bad,
a bad token is drawn, not one that is not allowed. Divided by any temperature that draws it is a
number in float32 still."""

_NONE = -1
"""Before the first token."""


class ForbiddenTokens(RowState):
    """A mask of the vocabulary for each request that has ``allowed_token_ids``."""

    @functools.cached_property
    def masks(self) -> Tensor:
        """[S, V] bool, True for what is not allowed. Not before a request asks: it is large."""
        size = (self.num_rows, self.vocab_size)
        return torch.zeros(size, dtype=torch.bool, device=self.platform.device)

    def fill(self, row: int, admission: Admission) -> None:
        allowed = np.array(admission.params.allowed_token_ids, dtype=np.int64)
        mask = self.masks[row].fill_(True)
        mask.index_fill_(0, to_device(allowed, self.platform), False)


class AllowedTokens:
    """Tokens that may be drawn from some of ``num_rows`` rows of logits."""

    def __init__(self, draws: Sequence[Draw], num_rows: int, forbidden: ForbiddenTokens) -> None:
        platform = forbidden.platform
        slots = np.array([forbidden.ensure(each.request) for each in draws], dtype=np.int64)
        places = np.array([each.row for each in draws], dtype=np.int64)
        masks = forbidden.masks
        self._mask = masks.new_zeros((num_rows, forbidden.vocab_size))
        self._mask.index_copy_(
            0, to_device(places, platform), masks.index_select(0, to_device(slots, platform))
        )

    def apply(self, logits: Tensor) -> None:
        """Take the other tokens from ``logits`` [N, V] float32, in place."""
        logits.masked_fill_(self._mask, -torch.inf)


class Words(NamedTuple):
    """A request's bad words, of N tokens before their last ones."""

    tokens: Ints
    """[N]"""
    distances: Ints
    """[N]: how far before the word's last token each is, from 1."""
    words: Ints
    """[N]: the word that each belongs to."""
    last: Ints
    """[B]: each word's last token."""


class RecentTokens(RowState):
    """The newest output tokens of each request that has bad words, and the words."""

    def __init__(self, vocab_size: int, num_rows: int, platform: Platform) -> None:
        super().__init__(vocab_size, num_rows, platform)
        size = (num_rows, 1)
        self.tokens = torch.full(size, _NONE, dtype=torch.int64, device=platform.device)
        """[S, L]: the newest is last. L grows with the longest word."""

    def forget(self) -> None:
        super().forget()
        self.words: dict[int, Words] = {}
        """By row."""

    def fill(self, row: int, admission: Admission) -> None:
        lengths = np.array([len(word) - 1 for word in admission.bad_words], dtype=np.int64)
        missing = int(lengths.max()) - self.tokens.shape[1]
        if missing > 0:  # those that have tokens here need no more than they have
            self.tokens = torch.nn.functional.pad(self.tokens, (missing, 0), value=_NONE)
        self.words[row] = Words(
            np.array([each for word in admission.bad_words for each in word[:-1]], dtype=np.int64),
            np.array([n for length in lengths for n in range(length, 0, -1)], dtype=np.int64),
            np.repeat(np.arange(len(lengths)), lengths),
            np.array([word[-1] for word in admission.bad_words], dtype=np.int64),
        )
        recent = np.full(self.tokens.shape[1], _NONE, dtype=np.int64)
        known = admission.token_ids[admission.num_prompt_tokens :][-len(recent) :]
        recent[len(recent) - len(known) :] = known
        self.tokens[row] = to_device(recent, self.platform)


class BadWords:
    """The bad words of some rows of a step's logits.

    Args:
        draws: The rows.
        num_drafts: K, most drafts of a request.
        recent: Has, or gets, the newest tokens of each request.
    """

    def __init__(self, draws: Sequence[Draw], num_drafts: int, recent: RecentTokens) -> None:
        self._recent = recent
        slots = [recent.ensure(each.request) for each in draws]
        words = [recent.words[slot] for slot in slots]
        length = recent.tokens.shape[1]
        # The texts of all draws side by side: newest tokens, then the request's drafts.
        ends = [
            index * (length + num_drafts) + length + each.ahead for index, each in enumerate(draws)
        ]
        firsts = np.cumsum([0, *(len(each.last) for each in words)])
        columns = (
            np.array([each.number for each in draws], dtype=np.int64),
            np.array(slots, dtype=np.int64),
            np.concatenate([each.tokens for each in words]),
            np.concatenate([end - each.distances for end, each in zip(ends, words, strict=True)]),
            np.concatenate(
                [first + each.words for first, each in zip(firsts[:-1], words, strict=True)]
            ),
            np.concatenate(
                [
                    draw.row * recent.vocab_size + each.last
                    for draw, each in zip(draws, words, strict=True)
                ]
            ),
            np.flatnonzero([each.ahead == 0 for each in draws]),
        )
        (
            self._numbers,
            self._slots,
            self._tokens,
            self._places,  # in the texts
            self._words,
            self._targets,  # in all logits
            first,
        ) = (to_device(each, recent.platform) for each in columns)
        # A request's tokens are noted once, however many draws it has.
        self._noted, self._noted_slots = self._numbers[first], self._slots[first]
        self._columns = torch.arange(length, device=recent.tokens.device)

    def apply(self, logits: Tensor, drafts: Tensor) -> None:
        """Make the last tokens of words whose others come last bad, in place on ``logits`` [N, V]
        float32; ``drafts``: [R, K] int64, of each of the step's requests, -1 for none."""
        texts = self._recent.tokens.index_select(0, self._slots)
        if drafts.shape[1]:
            texts = torch.cat((texts, drafts.index_select(0, self._numbers)), dim=1)
        recent = texts.view(-1).index_select(0, self._places)
        missing = torch.zeros_like(self._targets, dtype=torch.int32)
        missing.index_add_(0, self._words, (recent != self._tokens).int())
        logits.view(-1).index_add_(0, self._targets, (missing == 0) * BAD)

    def count(self, emitted: Tensor) -> None:
        """Note the new tokens of the step's requests, [R, 1 + K] int64, -1 for none."""
        tokens = emitted.index_select(0, self._noted)
        old = self._recent.tokens.index_select(0, self._noted_slots)
        both = torch.cat((old, tokens), dim=1)
        last = self._columns + (tokens >= 0).sum(dim=1, keepdim=True)
        self._recent.tokens.index_copy_(0, self._noted_slots, both.gather(1, last))
