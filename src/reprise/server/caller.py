"""One HTTP request that the engine works for: its streams, and whether its client is there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from reprise.server.client import Bell, EngineClient, EngineRefusal, Stream
from reprise.server.errors import GONE_CLIENT
from reprise.server.protocol import Connection


class Callers:
    """The callers of this process that are not answered yet."""

    def __init__(self) -> None:
        self._all: set[Caller] = set()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Caller]:
        return iter(list(self._all))

    def add(self, caller: Caller) -> None:
        self._all.add(caller)

    def remove(self, caller: Caller) -> None:
        self._all.discard(caller)


class Caller:
    """A client that waits for an answer. ``close`` it in any case.

    Args:
        client: Of the engine.
        callers: That it is one of.
        connection: Of the caller that waits.
    """

    __slots__ = (
        "_callers", "_client", "_connection", "_gone", "bell", "sending_since", "stalled",
        "streams", "task",
    )  # fmt: skip

    def __init__(self, client: EngineClient, callers: Callers, connection: Connection) -> None:
        self._client = client
        self._callers = callers
        self.bell = Bell()
        self.streams: list[Stream] = []
        self.sending_since: float | None = None
        """Of the loop's clock: since when the client has taken nothing."""
        self.stalled = False
        self.task = asyncio.current_task()
        self._gone = False
        self._connection = connection
        connection.when_lost(self._lost)
        callers.add(self)

    def ask(self, requests: Sequence[dict[str, Any]]) -> None:
        """Send requests to the engine.

        Raises:
            EngineRefusal: There is no engine.
        """
        others, last = self._connection.arrived(), len(requests) - 1
        for number, each in enumerate(requests):
            more = others or number < last
            self.streams.append(self._client.generate(self.bell, **each, more=more))
        if self._gone:
            self._lost()

    async def accepted(self) -> list[dict[str, Any]]:
        """Wait until the engine has all requests; what was wanted of each prompt.

        Raises:
            EngineRefusal: It refuses one.
        """
        for each in self.streams:
            while not each.accepted:
                await self.bell.next()
        return [each.facts for each in self.streams]

    def take(self) -> list[tuple[int, list[Any]]]:
        """What is new: number of the request, and as of :meth:`Stream.take`; empty: nothing.

        Raises:
            EngineRefusal: A request has failed.
        """
        if len(self.streams) == 1:
            item = self.streams[0].take()
            return [] if item is None else [(0, item)]
        found = []
        for number, stream in enumerate(self.streams):
            item = stream.take()
            if item is not None:
                found.append((number, item))
        return found

    async def next(self) -> list[tuple[int, list[Any]]]:
        """As :meth:`take`, when there is something.

        Raises:
            EngineRefusal: A request has failed.
        """
        while not (found := self.take()):
            await self.bell.next()
        return found

    def fail(self, refusal: EngineRefusal) -> None:
        """The caller is not to wait any longer."""
        for each in self.streams:
            each.leave()
            each.fail(refusal)

    def stall(self) -> None:
        """The client takes nothing: end this caller's task."""
        self.stalled = True
        if self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """What was not finished is aborted."""
        self._connection.when_lost(None)
        self._callers.remove(self)
        for each in self.streams:
            each.leave()

    def _lost(self) -> None:
        self._gone = True
        self.fail(EngineRefusal(GONE_CLIENT, ""))
