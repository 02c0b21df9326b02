"""Which tokens a graph has drawn since it was last found right."""

from __future__ import annotations

from collections.abc import Sequence

from reprise.graphs import Ran
from reprise.graphs.capture import Key
from reprise.request import Request
from reprise.step import Step

MOST = 4096
"""Requests remembered of one graph; of more, those that finished first are forgotten."""


class Suspects:
    """For each graph the requests whose tokens it drew unseen, with the first such token.

    Costs a decode step nothing while its rows stay the same.
    """

    def __init__(self) -> None:
        self._first: dict[Key, dict[Request, int]] = {}
        self._last: tuple[Key, list[Request]] | None = None
        """The graph of the last step, if it was unseen, and the requests that sampled."""

    def note(self, step: Step, requests: Sequence[Request], ran: Ran) -> None:
        """A step was submitted.

        Args:
            step: What was computed.
            requests: Its requests.
            ran: How.
        """
        if ran.proven and ran.graph is not None:
            self._first.pop(ran.graph, None)
        if ran.proven or ran.graph is None:
            self._last = None
            return
        sampling = list(requests)
        if step.num_decodes < len(sampling):
            sampling = [each for each, yes in zip(requests, step.samples, strict=True) if yes]
        if self._last == (ran.graph, sampling):
            return
        known = self._first.setdefault(ran.graph, {})
        for request in sampling:
            known.setdefault(request, request.num_output_tokens + request.num_pending - 1)
        if len(known) > MOST:
            self._forget_finished(known)
        self._last = ran.graph, sampling

    def accuse(self, graph: Key) -> int:
        """The graph was found wrong: mark what it drew. Returns the number of tokens so far."""
        tokens, self._last = 0, None
        for request, first in self._first.pop(graph, {}).items():
            earlier = request.suspect_from
            request.suspect_from = first if earlier is None else min(earlier, first)
            tokens += max(0, request.num_output_tokens - first)
        return tokens

    @staticmethod
    def _forget_finished(known: dict[Request, int]) -> None:
        for request in [each for each in known if each.is_finished]:
            del known[request]
