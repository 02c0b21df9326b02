"""Tokens that a request may draw: ``allowed_token_ids`` and ``bad_words``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reprise.platforms import Platform
from reprise.request import Request
from reprise.runner.buffers import Ints, to_device
from reprise.runner.request_slots import RequestSlots

BAD = -1e30
"""Added to the logit of a bad word's last token. It is finite: where all that is allowed is bad,
a bad token is drawn, not one that is not allowed. Divided by any temperature that draws it is a
number in float32 still."""

_NONE = -1
"""Before the first token."""


class ForbiddenTokens(RequestSlots):
    """A mask of the vocabulary for each request that has ``allowed_token_ids``."""

    @functools.cached_property
    def masks(self) -> Tensor:
        """[S, V] bool, True for what is not allowed. Not before somebody asks: it is large."""
        size = (self.max_requests, self.vocab_size)
        return torch.zeros(size, dtype=torch.bool, device=self.platform.device)

    def fill(self, slot: int, request: Request) -> None:
        allowed = np.array(request.params.allowed_token_ids, dtype=np.int64)
        row = self.masks[slot].fill_(True)
        row.index_fill_(0, to_device(allowed, self.platform), False)


class AllowedTokens:
    """Those of some rows of a batch of ``num_rows``."""

    def __init__(
        self, rows: Sequence[tuple[int, Request]], num_rows: int, forbidden: ForbiddenTokens
    ) -> None:
        platform = forbidden.platform
        slots = np.array([forbidden.slot_of(request) for _, request in rows], dtype=np.int64)
        places = np.array([row for row, _ in rows], dtype=np.int64)
        masks = forbidden.masks
        self._mask = masks.new_zeros((num_rows, forbidden.vocab_size))
        self._mask.index_copy_(
            0, to_device(places, platform), masks.index_select(0, to_device(slots, platform))
        )

    def apply(self, logits: Tensor) -> None:
        """Take the other tokens from ``logits`` [R, V] float32, in place."""
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


class RecentTokens(RequestSlots):
    """The newest output tokens of each request that has bad words, and the words."""

    def __init__(self, vocab_size: int, max_requests: int, platform: Platform) -> None:
        super().__init__(vocab_size, max_requests, platform)
        size = (max_requests, 1)
        self.tokens = torch.full(size, _NONE, dtype=torch.int64, device=platform.device)
        """[S, L]: the newest is last. L grows with the longest word."""

    def forget(self) -> None:
        super().forget()
        self.words: dict[str, Words] = {}
        """By request id."""

    def release(self, request_id: str) -> bool:
        self.words.pop(request_id, None)
        return super().release(request_id)

    def fill(self, slot: int, request: Request) -> None:
        lengths = np.array([len(word) - 1 for word in request.bad_words], dtype=np.int64)
        missing = int(lengths.max()) - self.tokens.shape[1]
        if missing > 0:  # those who have slots need no more than they have
            self.tokens = torch.nn.functional.pad(self.tokens, (missing, 0), value=_NONE)
        self.words[request.request_id] = Words(
            np.array([each for word in request.bad_words for each in word[:-1]], dtype=np.int64),
            np.array([n for length in lengths for n in range(length, 0, -1)], dtype=np.int64),
            np.repeat(np.arange(len(lengths)), lengths),
            np.array([word[-1] for word in request.bad_words], dtype=np.int64),
        )
        recent = np.full(self.tokens.shape[1], _NONE, dtype=np.int64)
        known = request.output_token_ids[-len(recent) :]
        recent[len(recent) - len(known) :] = known
        self.tokens[slot] = to_device(recent, self.platform)


class BadWords:
    """Those of some rows of a batch."""

    def __init__(self, rows: Sequence[tuple[int, Request]], recent: RecentTokens) -> None:
        self._recent = recent
        slots = [recent.slot_of(request) for _, request in rows]
        words = [recent.words[request.request_id] for _, request in rows]
        length = recent.tokens.shape[1]
        firsts = np.cumsum([0, *(len(each.last) for each in words)])
        columns = (
            np.array([row for row, _ in rows], dtype=np.int64),
            np.array(slots, dtype=np.int64),
            np.concatenate([each.tokens for each in words]),
            np.concatenate(
                [
                    (slot + 1) * length - each.distances
                    for slot, each in zip(slots, words, strict=True)
                ]
            ),
            np.concatenate(
                [first + each.words for first, each in zip(firsts[:-1], words, strict=True)]
            ),
            np.concatenate(
                [
                    row * recent.vocab_size + each.last
                    for (row, _), each in zip(rows, words, strict=True)
                ]
            ),
        )
        (
            self._rows,
            self._slots,
            self._tokens,
            self._places,  # in all recent tokens
            self._words,
            self._targets,  # in all logits
        ) = (to_device(each, recent.platform) for each in columns)

    def apply(self, logits: Tensor) -> None:
        """Make the last tokens of words whose others were drawn last bad, in place on ``logits``
        [R, V] float32."""
        recent = self._recent.tokens.view(-1).index_select(0, self._places)
        missing = torch.zeros_like(self._targets, dtype=torch.int32)
        missing.index_add_(0, self._words, (recent != self._tokens).int())
        logits.view(-1).index_add_(0, self._targets, (missing == 0) * BAD)

    def count(self, tokens: Tensor) -> None:
        """Note what was drawn, [R] int64."""
        old = self._recent.tokens.index_select(0, self._slots)
        new = torch.cat((old[:, 1:], tokens[self._rows].unsqueeze(1)), dim=1)
        self._recent.tokens.index_copy_(0, self._slots, new)
