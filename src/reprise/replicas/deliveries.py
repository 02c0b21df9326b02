"""What replicas say, handed on to the callers that wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reprise.engine import Reader
from reprise.engine.driver import refuse, settle
from reprise.errors import FailedRequestError, RanksError, StepError, named
from reprise.processes import wire
from reprise.replicas.outstanding import Outstanding, fail
from reprise.replicas.replica import Replica


class Deliveries:
    """For the thread that reads alone.

    Args:
        outstanding: What is awaited.
        replicas: The replica that speaks.
        text_of: Of tokens; None: they have none.
        in_step: They share experts: one that has lost the others ends.
        delivered: Called behind deliveries with the readers that got something.
    """

    def __init__(
        self,
        outstanding: Outstanding,
        replicas: Sequence[Replica],
        text_of: Callable[[int], str] | None,
        in_step: bool,
        delivered: Callable[[Sequence[Any]], None],
    ) -> None:
        self._outstanding = outstanding
        self._replicas = replicas
        self._text_of = text_of
        self._in_step = in_step
        self._delivered = delivered
        self._given: list[Reader] = []
        """Got something since the last :meth:`flush`."""

    def hear(self, message: Any) -> None:
        """A message of a replica's channel."""
        if isinstance(message, wire.Deltas):
            for number, *packed in message.items:
                self._take(number, tuple(packed))
        elif isinstance(message, wire.Refused):
            self._refused(message)
        elif isinstance(message, wire.Reply):
            asked = self._outstanding.answered(message.number)
            if asked is not None:
                settle(asked, lambda: message.result)

    def flush(self) -> None:
        """Returns the callers that got something."""
        given, self._given = self._given, []
        if given:
            self._delivered(given)

    def _take(self, number: int, packed: tuple[Any, ...]) -> None:
        """An item of :class:`wire.Deltas`: nothing if the request was accepted, else a delta."""
        outstanding = self._outstanding
        with outstanding.lock:
            request = outstanding.request(number)
            if request is None:
                return  # its reader has left
            if packed:
                delta = request.unpacked(packed, self._text_of)
                if delta.outputs:
                    outstanding.began(request)
                if delta.finished:
                    outstanding.forget(request)
        if not packed:
            request.reader.accepted(request)
            self._given.append(request.reader)
            settle(request.future, lambda: request)
            return
        if request.held is not None:
            request.held.extend(delta)
            delta = request.held
            request.held = None
        if delta.finished or request.reader.wants_more:
            request.reader.put(delta)
            self._given.append(request.reader)
        else:
            request.held = delta

    def _refused(self, message: wire.Refused) -> None:
        error = named(message.kind, message.message)
        if self._in_step and isinstance(error, RanksError):
            return  # its process ends, and why is told to all at once
        outstanding = self._outstanding
        with outstanding.lock:
            asked = outstanding.answered(message.number)
            request = outstanding.request(message.number)
            if request is not None:
                route = outstanding.forget(request)
        if asked is not None:
            refuse(asked, error)
        elif request is not None:
            if isinstance(error, StepError | RanksError):
                where = self._replicas[route.replica]
                error = type(error)(f"{where.name} ({where.device}): {error}; its log: {where.log}")
            if isinstance(error, FailedRequestError) and message.output is not None:
                error.outputs = [request.unpacked(message.output, self._text_of)]
            fail(request, error)
