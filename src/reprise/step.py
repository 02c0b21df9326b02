"""What the scheduler asks of the runner: one forward pass, as plain data.

A step can be sent to another process. Requests are named by their rows: a row is a request's place
on the device from its admission until it ends or is preempted. Row 0 belongs to no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reprise.sampling_params import SamplingParams
from reprise.shape import StepShape

if TYPE_CHECKING:  # a step can be read without torch
    from reprise.cache.request_table import Copy

NULL_ROW = 0
"""Padding reads and writes here."""


@dataclass(slots=True, eq=False)
class Admission:
    """A request gets a row: everything that the runner ever has to know of it."""

    row: int
    request_id: str
    start: int
    """Position of the first token to compute; the cache has those before it."""
    token_ids: Sequence[int]
    """All known tokens: the prompt, and what was generated before a preemption."""
    num_prompt_tokens: int
    limit: int
    """Most tokens to compute: all but the last one that it can have."""
    params: SamplingParams
    seed: int
    """Of the draws, 64 bits."""
    stop_token_ids: frozenset[int]
    """Tokens that are not drawn before ``params.min_tokens``."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    replay: int = 0
    """Of the tokens before ``start`` the last ones, which its states have beside them: its first
    step replays them."""


@dataclass(slots=True, frozen=True)
class TableEdit:
    """New entries of one row's block table, from column ``begin`` on."""

    row: int
    begin: int
    blocks: Sequence[int]


@dataclass(slots=True, eq=False)
class Masks:
    """The tokens that may be drawn from some of a step's rows of logits, of which each request that
    samples has one, and one for each of its drafts."""

    which: np.ndarray[Any, Any]
    """[N] int64, of each row of logits where its mask is in a table, -1 for none; it may be one
    mask for several."""
    size: int
    """Places of the table."""
    words: Sequence[tuple[int, np.ndarray[Any, Any]]]
    """What is new in the table: [C, ceil(V / 32)] int32, a bit a token as ``ops.apply_bitmask``
    reads it, from a place on. At the others is what was given last for them."""


@dataclass(slots=True, eq=False)
class Step:
    """What the runner computes in one forward pass.

    The first ``num_decodes`` requests compute their last token, which the device has, and verify
    the tokens drafted behind it; the others compute chunks of the tokens that they were admitted
    with, from where their last chunk ended.
    """

    index: int
    rows: Sequence[int]
    """[R]"""
    counts: Sequence[int]
    """[R]: known tokens to compute, 1 of a decode."""
    drafts: Sequence[int]
    """[R]: drafted tokens to verify beside them. How many count, only the device knows at first."""
    samples: Sequence[bool]
    """[R]: the request's last known token is computed, so that a token is drawn behind it."""
    num_decodes: int
    num_tokens: int
    """All of them, drafts included."""
    admitted: Sequence[Admission] = ()
    """Requests that compute for the first time, or again from their tokens."""
    edits: Sequence[Sequence[TableEdit]] = ((),)
    """New entries of block tables, for each lifetime of the model's caches."""
    released: Sequence[int] = ()
    """Rows that ended or were preempted since the last step; some may be in ``admitted`` again."""
    copies: Sequence[Copy] = ()
    """States to be copied before the step is computed, all at once."""
    drafting: int | None = None
    """Tokens to be drafted behind each request; None: as many as ever."""
    resting: bool = False
    """Nothing will be drafted for long: what drafts leaves out the decodes of this step, too."""

    @classmethod
    def of_nobody(cls) -> Step:
        """A step without requests: others that compute at the same time have some."""
        return cls(0, (), (), (), (), 0, 0)

    @property
    def shape(self) -> StepShape:
        """``decode`` if every request computes equally many tokens, drafts included."""
        requests = len(self.rows)
        if requests == 0:
            return StepShape.decode(0)
        if self.num_decodes == requests:
            return StepShape.decode(requests, self.num_tokens // requests)
        if self.num_tokens == requests:
            return StepShape.decode(requests)
        # Of a step's only request, if it is admitted in this step, nothing is computed but what
        # the cache has.
        prompt = requests == 1 and any(each.start == 0 for each in self.admitted)
        return StepShape.mixed(self.num_tokens, requests, prompt)
