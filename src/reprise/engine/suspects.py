"""Which tokens may be wrong for a graph that was replayed unseen since it was last found right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reprise.graphs import Ran
from reprise.graphs.capture import Key
from reprise.request import Request
from reprise.step import Step

MOST = 4096
"""Requests remembered; of more, those that have finished are forgotten."""


@dataclass(frozen=True)
class _Unseen:
    """When a graph was first replayed unseen."""

    tokens: dict[Request, int]
    """Of the requests that were there, which token came next."""
    met: int
    """Requests that had been there until then."""


class Suspects:
    """For each graph, how far requests had come when it was first replayed unseen.

    All that they got since is suspect, whichever graph drew it: a graph may have written what it is
    drawn from, as that of a prompt's chunk does, also for a request that finds the chunk in the
    cache, or it has written where it must not. Costs a decode step nothing while its rows stay the
    same.
    """

    def __init__(self) -> None:
        self._unseen: dict[Key, _Unseen] = {}
        self._met: dict[Request, int] = {}
        """Every request that has been in a step, with how many there were before it."""
        self._count = 0
        self._last: Sequence[Request] = ()
        """Of the last step."""

    def note(self, step: Step, requests: Sequence[Request], ran: Ran) -> None:
        """A step was submitted.

        Args:
            step: What was computed.
            requests: Its requests.
            ran: How.
        """
        if requests != self._last:
            self._last = list(requests)
            self._meet(requests)
        if ran.graph is None:
            return
        if ran.proven:
            self._unseen.pop(ran.graph, None)
        elif ran.graph not in self._unseen:
            self._unseen[ran.graph] = _Unseen(self._tokens(step, requests), self._count)

    def accuse(self, graph: Key) -> int:
        """The graph was found wrong: mark what it may have spoiled. Returns the number of tokens
        so far."""
        since = self._unseen.pop(graph, None)
        if since is None:
            return 0
        tokens = 0
        first = {each: 0 for each, number in self._met.items() if number >= since.met}
        for request, number in {**first, **since.tokens}.items():
            if request.num_output_tokens + request.num_pending <= number:
                continue  # all that it has yet to get is computed anew
            earlier = request.suspect_from
            request.suspect_from = number if earlier is None else min(earlier, number)
            tokens += max(0, request.num_output_tokens - number)
        return tokens

    def _meet(self, requests: Sequence[Request]) -> None:
        for each in requests:
            if each not in self._met:
                self._met[each] = self._count
                self._count += 1
        if len(self._met) > MOST:
            self._met = {k: v for k, v in self._met.items() if not k.is_finished}

    def _tokens(self, step: Step, requests: Sequence[Request]) -> dict[Request, int]:
        """Of all requests that run, the first token that is not drawn before this step."""
        found = {
            each: each.num_output_tokens + each.num_pending
            for each in self._met
            if not each.is_finished
        }
        sampling: Sequence[bool | int] = [True] * len(requests)
        if step.num_decodes < len(requests):
            sampling = step.samples
        for request, samples in zip(requests, sampling, strict=True):
            if samples and request in found:
                found[request] -= 1
        return found
