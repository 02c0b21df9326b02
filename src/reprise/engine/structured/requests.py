"""The grammars of all requests that have one, and the masks of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reprise.engine.structured.compiler import Compiled
from reprise.engine.structured.grammar import Grammar
from reprise.engine.structured.masks import MaskTable
from reprise.request import Request
from reprise.runner import StepOutput
from reprise.step import Masks, Step
from reprise.structured_outputs import StructuredOutputsParams

PROMPT_TAIL = 4
"""Tokens at its end: behind a thought that a template closes there is white space at most."""

_NONE = -1
"""In place of a mask."""


class Grammars:
    """The grammars of an engine's requests. For its thread alone.

    Args:
        vocab_size: Of the logits.
        eos_token_ids: The model's end-of-sequence tokens.
        pinned: Masks are written to page-locked memory, for a device to copy.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], *, pinned: bool = False
    ) -> None:
        self._masks = MaskTable(vocab_size, pinned=pinned)
        self._eos_token_ids = eos_token_ids
        self._of: dict[Request, Grammar] = {}
        self._latest: tuple[Sequence[Request], list[Grammar | None]] = (), []
        """Of the step before: its requests, and the grammars of these."""
        self._drafts: dict[Request, Sequence[int]] = {}
        """Behind the newest token of each."""
        self.left: set[Request] = set()
        """Those that may have a :meth:`surplus`; any other goes on."""
        self.num_masks = 0
        """Rows of masks, from the start."""

    def add(self, request: Request, compiled: Compiled) -> None:
        """The request's text has to match this."""
        params = request.params
        least = math.inf if params.ignore_eos else params.min_tokens
        held = self._eos_token_ids | request.stop_token_ids
        wanted = params.structured_outputs
        begin_after, opened_by = _thought(wanted, request.prompt_token_ids[-PROMPT_TAIL:])
        grammar = self._of[request] = Grammar(compiled, held, least, begin_after, opened_by)
        grammar.keep_in(self._masks)
        self._latest = (), []

    def discard(self, request: Request) -> None:
        """The request has ended."""
        if self._of.pop(request, None) is not None:
            self._latest = (), []
        self._drafts.pop(request, None)
        self.left.discard(request)

    def clear(self) -> None:
        """Forget all requests: they have ended."""
        self._of.clear()
        self._latest = (), []
        self._drafts.clear()
        self.left.clear()

    def steps_lost(self) -> None:
        """Steps were lost, their masks with them, and tokens that grammars have followed but no
        request has got."""
        self._masks.forget()
        for request, grammar in self._of.items():
            grammar.take((), request.num_output_tokens)

    def send_masks_again(self) -> None:
        """What the device has of them may be wrong."""
        self._masks.send_again()

    @property
    def count(self) -> int:
        """Requests that have one."""
        return len(self._of)

    def concern(self, step: Step, requests: Sequence[Request]) -> bool:
        """Whether a token is drawn for any that has a grammar."""
        return any(
            samples and request in self._of
            for request, samples in zip(requests, step.samples, strict=True)
        )

    def take(self, requests: Sequence[Request], output: StepOutput) -> None:
        """Follow the tokens of a step, before its requests get them."""
        proposed = output.proposed
        found = zip(requests, self._of_each(requests), output.sampled, strict=True)
        for number, (request, grammar, tokens) in enumerate(found):
            if grammar is not None and tokens and request.finish_reason is None:
                known = len(request.output_token_ids)
                if len(tokens) > 1 or not grammar.follow(tokens[0], known):
                    followed = grammar.take(tokens, known)
                    if followed < len(tokens) or grammar.ended:
                        self.left.add(request)
                if proposed:
                    self._drafts[request] = proposed[number]

    def surplus(self, request: Request) -> int | None:
        """Once a request has its new tokens: how many of them do not follow its grammar, because
        that had ended (0: it ends with the last one) or refuses them. None: it goes on, or its
        limit came before the end of its grammar, in a step that has drawn both."""
        grammar = self._of.get(request)
        if grammar is None:
            return None
        beyond = request.num_output_tokens - grammar.num_tokens
        return beyond if beyond > 0 or (grammar.ended and beyond == 0) else None

    def ended(self, request: Request) -> bool:
        """Its grammar allows no further token."""
        return self._of[request].ended

    def masks(self, step: Step, requests: Sequence[Request]) -> Masks | None:
        """The masks of a step whose requests' grammars have followed all tokens before it; None:
        the grammars of all have ended. They are valid until the next call, which may come when the
        step has brought its tokens."""
        masks, most = self._masks, max(step.drafts)
        masks.begin(min(len(self._of), len(requests)) * (1 + most))
        places = self._drafted(step, requests) if most else self._drawn(step, requests)
        there = set(places)
        there.discard(_NONE)
        if not there:
            return None
        self.num_masks += len(places) - places.count(_NONE)
        words = masks.settle(there)
        return Masks(masks.which(places), len(masks), words)

    def _of_each(self, requests: Sequence[Request]) -> list[Grammar | None]:
        """Their grammars: mostly those of the step before."""
        if self._latest[0] != requests:
            self._latest = requests, [self._of.get(each) for each in requests]
        return self._latest[1]

    def _drawn(self, step: Step, requests: Sequence[Request]) -> list[int]:
        """The place of each row's mask where there are no drafts."""
        each = self._of_each(requests)
        texts: list[Grammar] = []
        which: list[bool] = []
        for request, grammar, samples in zip(requests, each, step.samples, strict=True):
            if samples:
                has = grammar is not None and request.finish_reason is None and not grammar.ended
                if grammar is not None and has:
                    texts.append(grammar)
                which.append(has)
        places = self._masks.of(texts)
        if len(places) == len(which):
            return places
        left = iter(places)
        return [next(left) if has else _NONE for has in which]

    def _drafted(self, step: Step, requests: Sequence[Request]) -> list[int]:
        """Likewise where there are."""
        places: list[int] = []
        for request, samples, drafts in zip(requests, step.samples, step.drafts, strict=True):
            if not samples:
                continue
            grammar = self._of.get(request)
            found: list[int] = []
            if grammar is not None and request.finish_reason is None:
                found = grammar.fill(self._masks, self._drafts.get(request, ())[:drafts])
            places += found
            places += [_NONE] * (1 + drafts - len(found))
        return places


def _thought(
    wanted: StructuredOutputsParams | None, tail: Sequence[int]
) -> tuple[int | None, int | None]:
    """``begin_after`` and ``opened_by`` of a text behind a prompt with this end."""
    if wanted is None:
        return None, None
    found = wanted.begin_after, wanted.opened_by
    for token in tail:
        if token == wanted.opened_by:
            found = wanted.begin_after, None  # the prompt has the beginning of a thought
        elif token == wanted.begin_after:
            found = None, None  # it has an empty one, which is closed
    return found
