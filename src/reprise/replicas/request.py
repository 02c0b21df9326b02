"""A request that a replica computes, as the program knows it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from reprise.engine import Reader
from reprise.engine.prompt import PreparedPrompt
from reprise.engine.submission import PreparedParams
from reprise.outputs import RequestMetrics, RequestOutput
from reprise.replicas.deltas import unpack
from reprise.replicas.router import Route


class Request:
    """What is known of an unfinished request. As an :class:`reprise.engine.Acceptance` it tells
    readers what was accepted."""

    def __init__(
        self,
        request_id: str,
        prompt: PreparedPrompt,
        params: PreparedParams,
        priority: int,
        reader: Reader,
        accepted: Future[Any] | None = None,
        whole: bool = False,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt.text
        self.prompt_token_ids = prompt.token_ids
        self.params = params.params
        self.prepared = prompt, params
        self.priority = priority
        self.wants = ["whole"] if whole else []
        self.reader = reader
        self.number = 0
        self.route: Route | None = None
        self.future: Future[Any] = Future() if accepted is None else accepted
        """Done when the replica has it."""
        self.waits = True
        """Nothing of it has been generated."""
        self.metrics: RequestMetrics | None = None
        self.output: list[int] = []
        """Of its only completion, for what the replica then has in its cache."""
        self.held: RequestOutput | None = None
        """What the reader did not want yet."""

    def unpacked(
        self, packed: tuple[Any, ...], text_of: Callable[[int], str] | None
    ) -> RequestOutput:
        """A delta of it, with what is known here already.

        Args:
            packed: As :func:`reprise.replicas.deltas.pack` made it.
            text_of: Of tokens; None: they have none.
        """
        delta = unpack(
            packed, self.request_id, self.prompt, self.prompt_token_ids, self.metrics, text_of
        )
        self.metrics = delta.metrics
        if self.params.n == 1 and delta.outputs:
            self.output += delta.outputs[0].token_ids
        return delta
