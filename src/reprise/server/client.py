"""An HTTP process's side of the connection to the engine."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, cast

from reprise.errors import RepriseError
from reprise.server import wire

logger = logging.getLogger(__name__)

GONE = "EngineGone"
MOST_HELD = 8
"""Messages to the engine that are written together: a write wakes its process, which takes as long
as half of what is done for a request. Of a burst it is to have some while others are checked."""


class EngineRefusal(RepriseError):
    """The engine's process refused a request or failed at it.

    Args:
        kind: Name of the exception there; :data:`GONE`: the process itself has ended.
        message: Of the exception.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Bell:
    """Calls its listener, or else wakes the one coroutine that waits."""

    # Slots, here and in what else each piece of each stream goes through: of dozens of streams each
    # has its own, so that what a piece costs is how much memory is read that is in no cache.
    __slots__ = ("_waiter", "listener")

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None
        self.listener: Callable[[], None] | None = None
        """Raises nothing: it is called in the midst of others' news."""

    def next(self) -> asyncio.Future[None]:
        """Await this: done when it rings."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def ring(self) -> None:
        if self.listener is not None:
            self.listener()
            return
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)


class Stream:
    """What comes of one request.

    Args:
        client: That made it.
        number: On the wire.
        bell: Of the coroutine that reads this stream, and perhaps others.
    """

    __slots__ = (
        "_accepted", "_bell", "_client", "_error", "_item", "_number", "_over", "facts", "texts",
    )  # fmt: skip

    def __init__(self, client: EngineClient, number: int, bell: Bell) -> None:
        self.facts: dict[str, Any] = {}
        """Of the prompt, behind :meth:`accepted`."""
        self.texts: Callable[[str, int], bool] | None = None
        """Takes a text that comes alone, and how many tokens it is, if it can just now; no item has
        it then. It raises nothing."""
        self._client = client
        self._number = number
        self._bell = bell
        self._accepted = False
        self._item: list[Any] | None = None
        self._error: EngineRefusal | None = None
        self._over = False

    @property
    def accepted(self) -> bool:
        """Whether the engine has the request.

        Raises:
            EngineRefusal: It does not take it.
        """
        if self._error is not None:
            raise self._error
        return self._accepted

    def take(self) -> list[Any] | None:
        """What is new, a long item of :class:`wire.Deltas`; None: nothing.

        Raises:
            EngineRefusal: The request has failed.
        """
        item = self._item
        if item is not None:
            self._item = None
            return item
        if self._error is not None:
            raise self._error
        return None

    def leave(self) -> None:
        """It is not read any more; the request ends if it has not."""
        self.texts = None  # it has its reader, and that has this
        self._client.forget(self._number, tell=not self._over)

    # ---- the client calls these ------------------------------------------------------------

    def accept(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self._accepted = True
        self._bell.ring()

    def put_text(self, text: str, tokens: int | list[int]) -> None:
        """The short item of :class:`wire.Deltas`."""
        alone = type(tokens) is int
        count = tokens if alone else len(tokens)  # type: ignore[arg-type]
        if self.texts is None or not self.texts(text, count):  # type: ignore[arg-type]
            more = None
            if not alone:
                more = {"ids": [], "sizes": tokens, "logprobs": None, "suspect_from": None}
            self.put([self._number, [[0, text, count, None, None, more]], None, None])

    def put(self, item: list[Any]) -> None:
        """The long item of :class:`wire.Deltas`; what was not taken yet becomes one with it."""
        if item[2] is not None:
            self._over = True
        self._item = item if self._item is None else _merged(self._item, item)
        self._bell.ring()

    def fail(self, error: EngineRefusal) -> None:
        self._error = error
        self._over = True
        self._bell.ring()


def _merged(first: list[Any], later: list[Any]) -> list[Any]:
    number, outputs, _, prompt = first
    known = {each[0]: each for each in outputs}
    for each in later[1]:
        before = known.get(each[0])
        if before is None:
            outputs.append(each)
            continue
        _, text, count, finish, stop, more = each
        before[1] += text
        before[2] += count
        before[3], before[4] = finish, stop
        if more is not None and before[5] is not None:
            before[5]["ids"] += more["ids"]
            before[5]["sizes"] += more["sizes"]
            if more["logprobs"] is not None:
                before[5]["logprobs"] = (before[5]["logprobs"] or []) + more["logprobs"]
            before[5]["suspect_from"] = more["suspect_from"]
        elif more is not None:
            before[5] = more
    return [number, outputs, later[2], prompt if prompt is not None else later[3]]


def joined(items: list[list[Any]], later: list[list[Any]]) -> list[list[Any]]:
    """Items of two steps as those of one. Where several steps have come at once this process is
    behind, and a text of several tokens costs it no more than one of a single token.

    Args:
        items: Of :class:`wire.Deltas`; changed.
        later: As they are sent behind these.
    """
    last = {item[0]: item for item in items}
    for item in later:
        before = last.get(item[0])
        if before is not None and len(before) == len(item) == 3:
            before[1] += item[1]
            before[2] += item[2]
        else:
            last[item[0]] = item
            items.append(item)
    return items


class EngineClient(asyncio.Protocol):
    """Speaks with the engine's process."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] | None = None
        """Of the engine; None: it is being loaded."""
        self.lost: str | None = None
        """Why there is no engine any more."""
        self.ready = asyncio.Event()
        self._numbers = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._frames = wire.Frames()
        self._transport: asyncio.Transport | None = None
        self._held: list[bytes] | None = None
        """Frames for the end of this turn of the loop; None: nothing was written in it yet."""

    def generate(self, bell: Bell, **request: Any) -> Stream:
        """Send a request.

        Args:
            bell: Rung when there is news.
            **request: Fields of :class:`wire.Generate` but the number.

        Raises:
            EngineRefusal: There is no engine.
        """
        self._check()
        number = next(self._numbers)
        stream = self._streams[number] = Stream(self, number, bell)
        self._send(wire.Generate(number, **request))
        return stream

    async def call(self, what: str, **arguments: Any) -> Any:
        """Ask something beside generation.

        Raises:
            EngineRefusal: There is no answer.
        """
        self._check()
        number = next(self._numbers)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        self._send(wire.Call(number, what, arguments))
        try:
            return await future
        finally:
            self._calls.pop(number, None)

    def tell(self, what: str, **arguments: Any) -> None:
        """As :meth:`call`, without waiting for the answer."""
        if self.lost is None:
            self._send(wire.Call(next(self._numbers), what, arguments))

    def forget(self, number: int, tell: bool) -> None:
        """A stream's reader is gone."""
        if self._streams.pop(number, None) is not None and tell and self.lost is None:
            self._send(wire.Leave(number))

    def _check(self) -> None:
        if self.lost is not None:
            raise EngineRefusal(GONE, self.lost)
        if self.facts is None:
            raise EngineRefusal(GONE, "the model is being loaded; try again later")

    def _send(self, message: wire.Message) -> None:
        assert self._transport is not None
        data = wire.frame(message)
        if self._held is None:
            self._held = []
            asyncio.get_running_loop().call_soon(self._end_turn)
            self._transport.write(data)
            return
        self._held.append(data)
        if len(self._held) == MOST_HELD:
            self._write_held()

    def _end_turn(self) -> None:
        self._write_held()
        self._held = None

    def _write_held(self) -> None:
        assert self._transport is not None
        if self._held and self.lost is None:
            self._transport.write(b"".join(self._held))
        self._held = []

    # ---- asyncio.Protocol ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class

    def data_received(self, data: bytes) -> None:
        items: list[list[Any]] = []
        for message in self._frames.feed(data):
            if isinstance(message, wire.Deltas):
                items = joined(items, message.items) if items else message.items
            else:
                self._put(items)
                items = []
                self._other(message)
        self._put(items)

    def _put(self, items: list[list[Any]]) -> None:
        streams = self._streams
        for item in items:
            stream = streams.get(item[0])
            if stream is None:
                continue
            if len(item) == 3:
                stream.put_text(item[1], item[2])
            else:
                stream.put(item)

    def _other(self, message: Any) -> None:
        if isinstance(message, wire.Accepted):
            stream = self._streams.get(message.number)
            if stream is not None:
                stream.accept(message.facts)
        elif isinstance(message, wire.Refused):
            error = EngineRefusal(message.kind, message.message)
            if message.number in self._streams:
                self._streams[message.number].fail(error)
            elif message.number in self._calls and not self._calls[message.number].done():
                self._calls[message.number].set_exception(error)
        elif isinstance(message, wire.Reply):
            future = self._calls.get(message.number)
            if future is not None and not future.done():
                future.set_result(message.result)
        elif isinstance(message, wire.Hello):
            if message.protocol != wire.PROTOCOL:
                self._lose(
                    f"the engine's process speaks protocol {message.protocol} and this one "
                    f"{wire.PROTOCOL}: restart the server behind an update"
                )
                return
            self.facts = message.facts
            self.ready.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._lose("the engine's process has ended; the server is shutting down")

    def _lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            refusal = EngineRefusal(GONE, reason)
            for stream in list(self._streams.values()):
                stream.fail(refusal)
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(refusal)
