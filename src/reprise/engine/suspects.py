"""Which tokens a graph has drawn since it was last found right."""

from __future__ import annotations

from reprise.graphs import Ran
from reprise.graphs.capture import Key
from reprise.request import Request
from reprise.step import ScheduledStep

MOST = 4096
"""Requests remembered of one graph; of more, those that finished first are forgotten."""


class Suspects:
    """For each graph the requests whose tokens it drew unseen, with the first such token.

    Costs a decode step nothing while its rows stay the same.
    """

    def __init__(self) -> None:
        self._first: dict[Key, dict[Request, int]] = {}
        self._last: Key | None = None

    def note(self, step: ScheduledStep, ran: Ran) -> None:
        """A step was submitted."""
        key = None if ran.proven else ran.graph
        if ran.proven and ran.graph is not None:
            self._first.pop(ran.graph, None)
        if key is not None and not (step.continues and key == self._last):
            known = self._first.setdefault(key, {})
            for each in step.requests:
                if each.samples:
                    request = each.request
                    drawn = request.num_output_tokens + request.num_pending - 1
                    known.setdefault(request, drawn)
            if len(known) > MOST:
                self._forget_finished(known)
        self._last = key

    def accuse(self, graph: Key) -> int:
        """The graph was found wrong: mark what it drew. Returns the number of tokens so far."""
        tokens = 0
        for request, first in self._first.pop(graph, {}).items():
            earlier = request.suspect_from
            request.suspect_from = first if earlier is None else min(earlier, first)
            tokens += max(0, request.num_output_tokens - first)
        return tokens

    @staticmethod
    def _forget_finished(known: dict[Request, int]) -> None:
        for request in [each for each in known if each.is_finished]:
            del known[request]
