"""Tokens that a request may draw: ``allowed_token_ids`` and ``bad_words``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

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

_ANY, _NONE = -1, -2
"""No tokens: an entry of a prefix that every token matches, and a place before the first token."""


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


class RecentTokens(RequestSlots):
    """The newest output tokens of each request that has bad words, and the words."""

    def __init__(self, vocab_size: int, max_requests: int, platform: Platform) -> None:
        super().__init__(vocab_size, max_requests, platform)
        size = (max_requests, 1)
        self.tokens = torch.full(size, _NONE, dtype=torch.int64, device=platform.device)
        """[S, W]: the newest is last. W grows with the longest word."""

    def forget(self) -> None:
        super().forget()
        self.words: dict[str, tuple[Ints, Ints]] = {}
        """By request id: prefixes [B, P], aligned right, and last tokens [B]."""

    def release(self, request_id: str) -> bool:
        self.words.pop(request_id, None)
        return super().release(request_id)

    def fill(self, slot: int, request: Request) -> None:
        words = request.bad_words
        width = max(1, *(len(word) - 1 for word in words))
        missing = width - self.tokens.shape[1]
        if missing > 0:  # those who have slots need no more than they have
            self.tokens = torch.nn.functional.pad(self.tokens, (missing, 0), value=_NONE)
        prefixes = np.full((len(words), width), _ANY, dtype=np.int64)
        for row, word in enumerate(words):
            prefixes[row, width - len(word) + 1 :] = word[:-1]
        last = np.array([word[-1] for word in words], dtype=np.int64)
        self.words[request.request_id] = prefixes, last
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
        counts = [len(last) for _, last in words]
        self._width = max(prefixes.shape[1] for prefixes, _ in words)
        prefixes = np.full((sum(counts), self._width), _ANY, dtype=np.int64)
        begin = 0
        for each, _ in words:
            prefixes[begin : begin + len(each), self._width - each.shape[1] :] = each
            begin += len(each)
        numbers = np.array([row for row, _ in rows], dtype=np.int64)
        starts = np.repeat(numbers * recent.vocab_size, counts)
        columns = (
            numbers,
            np.array(slots, dtype=np.int64),
            np.repeat(np.array(slots, dtype=np.int64), counts),
            prefixes,
            starts + np.concatenate([last for _, last in words]),
        )
        self._rows, self._slots, self._slot_of_word, self._prefixes, self._places = (
            to_device(each, recent.platform) for each in columns
        )
        self._any = self._prefixes == _ANY

    def apply(self, logits: Tensor) -> None:
        """Make the last tokens of words whose others were drawn last bad, in place on ``logits``
        [R, V] float32."""
        recent = self._recent.tokens[:, -self._width :].index_select(0, self._slot_of_word)
        drawn = ((recent == self._prefixes) | self._any).all(dim=1)
        logits.view(-1).index_add_(0, self._places, drawn * BAD)

    def count(self, tokens: Tensor) -> None:
        """Note what was drawn, [R] int64."""
        old = self._recent.tokens.index_select(0, self._slots)
        new = torch.cat((old[:, 1:], tokens[self._rows].unsqueeze(1)), dim=1)
        self._recent.tokens.index_copy_(0, self._slots, new)
