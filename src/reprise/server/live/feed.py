"""One event stream for any number of readers: the engine is asked once a second, and only while the
page is open."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from reprise.server.client import Bell, EngineRefusal
from reprise.server.errors import ApiError
from reprise.server.live.view import State, View
from reprise.server.live.window import Window
from reprise.server.protocol import CONNECTION
from reprise.server.state import ServerState
from reprise.server.streaming import STREAM_HEADERS

logger = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
PATIENCE_SECONDS = 3.0
"""For an answer of the engine, which is between two steps; then its readers are told."""
MOST_READERS = 64
"""Of one process: each keeps a connection."""


class Reader:
    """A reader of the events. Holds the newest event that was not sent yet, and no other."""

    def __init__(self) -> None:
        self.bell = Bell()
        self.event: bytes | None = None
        self.over = False
        """There will be no more."""
        self.task: asyncio.Task[None] | None = None
        self.sending_since: float | None = None
        """Of the loop's clock: since when the client has taken nothing."""
        self.stalled = False

    def put(self, event: bytes) -> None:
        """Put an event in the place of one that was not sent."""
        self.event = event
        self.bell.ring()

    def end(self) -> None:
        self.over = True
        self.bell.ring()

    def stall(self) -> None:
        """The client takes nothing: end its task."""
        self.stalled = True
        if self.task is not None:
            self.task.cancel()


class Feed:
    """The events of one HTTP process, and their readers.

    Args:
        state: Of the process.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._window = Window()
        self._polling: asyncio.Task[None] | None = None
        self.readers: set[Reader] = set()
        self._closed = False

    def join(self) -> Reader:
        """A new reader, to be given to :meth:`leave`.

        Raises:
            ApiError: There are too many.
        """
        if len(self.readers) >= MOST_READERS:
            raise ApiError(429, f"{MOST_READERS} readers look already: close a page")
        reader = Reader()
        self.readers.add(reader)
        if self._closed:
            reader.end()
        elif self._polling is None:
            self._window = Window()
            self._polling = asyncio.create_task(self._poll())
        return reader

    def leave(self, reader: Reader) -> None:
        self.readers.discard(reader)
        if not self.readers and self._polling is not None:
            self._polling.cancel()
            self._polling = None

    def close(self) -> None:
        """The process ends: so do the streams."""
        self._closed = True
        for each in self.readers:
            each.end()

    async def _poll(self) -> None:
        try:
            while True:
                began = asyncio.get_running_loop().time()
                await self._look()
                took = asyncio.get_running_loop().time() - began
                await asyncio.sleep(max(0.0, EVERY_SECONDS - took))
        except Exception:
            logger.exception("the live view ends")
            self.close()

    async def _look(self) -> None:
        client = self._state.client
        if client.lost is not None:
            self._tell("lost", client.lost)
            return
        if client.facts is None:
            self._tell("loading", "the model is being loaded")
            return
        asked = asyncio.ensure_future(client.call("live"))
        try:
            while not (await asyncio.wait({asked}, timeout=PATIENCE_SECONDS))[0]:
                self._tell("silent", "the engine has not answered for some seconds")
            self._window.add(asked.result())
        except EngineRefusal as refusal:
            self._tell("lost", str(refusal))
            return
        finally:
            asked.cancel()
        if self._state.draining:
            self._tell("draining", "running requests end, new ones are refused")
        else:
            self._tell("serving", None)

    def _tell(self, state: State, message: str | None) -> None:
        facts = self._state.client.facts or {}
        names = ("device", "dtype", "version", "max_model_len")
        view = View(
            state, message, time.time(), self._state.names[0],
            {name: facts.get(name) for name in names}, **self._window.fields(),
        )  # fmt: skip
        event = b"data: " + orjson.dumps(view) + b"\n\n"
        for each in self.readers:
            each.put(event)


class LiveStream(Response):
    """Sends a reader's events.

    Args:
        feed: Left at the end.
        reader: Of the feed.
    """

    def __init__(self, feed: Feed, reader: Reader) -> None:
        super().__init__(None, 200, STREAM_HEADERS)
        del self.headers["content-length"]
        self._feed = feed
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader = self._reader
        watch = asyncio.create_task(_until_gone(receive, reader))
        reader.task = asyncio.create_task(self._send(send))
        try:
            await reader.task
        except asyncio.CancelledError:
            reader.task.cancel()
            if not reader.stalled:
                raise
            scope["state"]["gone"] = True
            await scope["state"][CONNECTION].abort()
        finally:
            watch.cancel()
            self._feed.leave(reader)

    async def _send(self, send: Send) -> None:
        reader, loop = self._reader, asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while not reader.over:
            event, reader.event = reader.event, None
            if event is None:
                await reader.bell.next()
                continue
            reader.sending_since = loop.time()
            await send({"type": "http.response.body", "body": event, "more_body": True})
            reader.sending_since = None
        await send({"type": "http.response.body", "body": b""})


async def _until_gone(receive: Receive, reader: Reader) -> None:
    message: Any = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
    reader.end()
