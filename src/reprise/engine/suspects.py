"""Which tokens may be wrong for a graph that was replayed unseen since it was last found right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reprise.graphs import Ran
from reprise.graphs.capture import Key
from reprise.request import Request
from reprise.step import Step

MOST = 4096
"""Requests remembered of those that have ended."""


@dataclass(frozen=True)
class _Unseen:
    """When a graph was first replayed unseen."""

    tokens: dict[int, int]
    """Of the requests that were there, by their numbers, which token came next."""
    met: int
    """Requests that had been there until then."""

    def first(self, number: int) -> int | None:
        """The first token of a request that is suspect; None: none is."""
        return 0 if number >= self.met else self.tokens.get(number)


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
        """Every request that has been in a step and has not ended, with its number: how many there
        were before it."""
        self._ended: dict[int, int] = {}
        """Of those that have, by their numbers: how many tokens they got."""
        self._count = 0
        self._last: Sequence[Request] = ()
        """Of the last step."""

    def note(self, step: Step, requests: Sequence[Request], ran: Ran) -> None:
        """A step was submitted.

        Args:
            step: What was computed.
            requests: Its requests.
            ran: How it was computed.
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
        for number, count in self._ended.items():
            begin = since.first(number)
            tokens += 0 if begin is None else max(0, count - begin)
        for request, number in self._met.items():
            begin = since.first(number)
            if begin is None or request.num_output_tokens + request.num_pending <= begin:
                continue  # all that it has yet to get is computed anew
            earlier = request.suspect_from
            request.suspect_from = begin if earlier is None else min(earlier, begin)
            tokens += max(0, request.num_output_tokens - begin)
        return tokens

    def _meet(self, requests: Sequence[Request]) -> None:
        for each in requests:
            if each not in self._met:
                self._met[each] = self._count
                self._count += 1
        for each in [each for each in self._met if each.is_finished]:
            self._ended[self._met.pop(each)] = each.num_output_tokens
        for number in list(self._ended)[: max(0, len(self._ended) - MOST)]:
            del self._ended[number]

    def _tokens(self, step: Step, requests: Sequence[Request]) -> dict[int, int]:
        """Of all requests that run, the first token that is not drawn before this step."""
        found = {
            number: each.num_output_tokens + each.num_pending for each, number in self._met.items()
        }
        sampling: Sequence[bool | int] = [True] * len(requests)
        if step.num_decodes < len(requests):
            sampling = step.samples
        for request, samples in zip(requests, sampling, strict=True):
            if samples and request in self._met:
                found[self._met[request]] -= 1
        return found
