"""uvicorn's HTTP protocol with an end to waiting for a request's head, and what it can do that
ASGI has no word for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from reprise.server.arrivals import READ_SECONDS, SOON_SECONDS, Arrivals
from reprise.server.errors import ApiError

logger = logging.getLogger(__name__)

MOST_BEHIND = 8
"""Requests that are read while an earlier one of the same connection is answered: a client's end is
seen by reading alone."""
MOST_BYTES_BEHIND = 1 << 20
"""Of their bodies."""

CONNECTION = "connection"
"""Of ``scope["state"]``: the :class:`Connection` of the request."""


class Outbox:
    """Pieces of all connections' replies that go out with the loop's next turn.

    All of a step are made first and written then: what the system does for a write drives the
    interpreter out of the processor's caches, and it would have to come back for each piece.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[asyncio.Transport, bytes]] = []

    def put(self, transport: asyncio.Transport, data: bytes) -> None:
        """Have this written before what any callback writes that is scheduled after this."""
        if not self._pieces:
            asyncio.get_running_loop().call_soon(self._write)
        self._pieces.append((transport, data))

    def _write(self) -> None:
        pieces, self._pieces = self._pieces, []
        for transport, data in pieces:
            if transport.is_closing():  # its client is gone, or about to be dropped
                continue
            try:
                transport.write(data)
            except Exception:  # the others' pieces are to go out
                logger.exception("a connection that cannot be written to is dropped")
                transport.abort()


class Connection:
    """The client's, while one request is answered.

    Args:
        cycle: uvicorn's, of the request.
        outbox: Of the process.
        arrivals: Of the process.
    """

    __slots__ = (
        "_arrivals", "_cycle", "_flow", "_lost", "_outbox", "_transport", "_when_lost",
    )  # fmt: skip

    def __init__(self, cycle: RequestResponseCycle, outbox: Outbox, arrivals: Arrivals) -> None:
        self._cycle = cycle
        self._outbox = outbox
        self._arrivals = arrivals
        self._transport = cycle.transport
        self._flow = cycle.flow
        self._lost = False
        self._when_lost: Callable[[], None] | None = None

    @property
    def answered(self) -> bool:
        """The reply is complete."""
        return bool(self._cycle.response_complete)

    def arrived(self) -> bool:
        """The request is about to be asked. Whether others come behind it in a moment."""
        self._arrivals.end(self._transport)
        return self._arrivals.any()

    def when_lost(self, call: Callable[[], None] | None) -> None:
        """Call it when the client is gone, at once if it is; None: nothing any more. The body was
        read."""
        self._when_lost = call
        if call is None:
            return
        if self._lost:
            call()
        else:
            self._flow.resume_reading()  # a large body may have paused it: no end would be seen

    @property
    def num_unread(self) -> int:
        """Bytes of the body that came and were not asked for."""
        return len(self._cycle.body)

    def lost(self) -> None:
        """The client is gone."""
        self._lost = True
        # uvicorn tells the last one alone; another would write into what is closed.
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        if self._when_lost is not None:
            self._when_lost()

    @property
    def full(self) -> bool:
        """What was sent waits for the client to read: :meth:`send` would wait too. So it may where
        the client has sent its last byte, which closes the transport behind all that waits."""
        return self._flow.write_paused or self._transport.is_closing()

    async def send(self, body: bytes, more: bool = True) -> None:
        """Send a piece of the reply's body, once there is room.

        Args:
            body: Behind what was sent.
            more: It is not the last one.
        """
        await self._cycle.send({"type": "http.response.body", "body": body, "more_body": more})

    def send_soon(self, body: bytes) -> None:
        """As :meth:`send`, without waiting. The reply has no length, so that it is sent in chunks.

        Args:
            body: Not empty; more will follow.
        """
        self._outbox.put(self._transport, b"%x\r\n%b\r\n" % (len(body), body))

    def end_soon(self, body: bytes) -> None:
        """As :meth:`send_soon`, of the last piece, and the end behind it: in the loop's next turn
        call :meth:`ended`.

        Args:
            body: Not empty.
        """
        self._outbox.put(self._transport, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))

    def ended(self) -> None:
        """The reply's end was written: what uvicorn does behind one that it writes itself."""
        cycle = self._cycle
        if cycle.disconnected:
            return
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()

    async def abort(self) -> None:
        """Drop the connection with all that waits in it: a client that reads nothing would hold
        it."""
        self._transport.abort()
        await asyncio.sleep(0)


class Protocol(HttpToolsProtocol):
    """uvicorn waits for ever for a line of a head that does not come, and takes heads of any size:
    a few clients that send a byte a minute would hold all connections that the process may have.

    A connection that has answered and is idle is not meant: ``timeout_keep_alive`` ends it.
    """

    head_seconds: float
    """From the connection, or from the first byte of a later request, to the end of its head."""
    most_head_bytes: int
    outbox: Outbox
    arrivals: Arrivals

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._waiting: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._requests: list[Connection] = []
        """Those that are not answered, as far as is known; several if a client does not wait."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.arrivals.expect(transport, SOON_SECONDS)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self.arrivals.end(self.transport)
        super().connection_lost(exc)
        lost, self._requests = self._requests, []
        for each in lost:
            each.lost()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.pipeline and not self.transport.is_closing():
            behind = [each.num_unread for each in self._requests[-len(self.pipeline) :]]
            if len(behind) <= MOST_BEHIND and sum(behind) <= MOST_BYTES_BEHIND:
                self.flow.resume_reading()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.arrivals.expect(self.transport, SOON_SECONDS)
        self._head_bytes = 0
        if self._waiting is None:
            self._wait()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._arrived()
        if self.transport.is_closing():
            return
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:  # it is no upgrade
            connection = Connection(self.cycle, self.outbox, self.arrivals)
            self._requests = [each for each in self._requests if not each.answered]
            self._requests.append(connection)
            self.scope["state"][CONNECTION] = connection

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.scope["method"] == "POST" and not self.pipeline:
            self.arrivals.expect(self.transport, READ_SECONDS)
        else:
            self.arrivals.end(self.transport)

    def on_response_complete(self) -> None:
        self.arrivals.end(self.transport)
        super().on_response_complete()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(self.head_seconds, self._late)

    def _arrived(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.most_head_bytes:
            self._refuse(431, f"the request's head is larger than {self.most_head_bytes} bytes")

    def _late(self) -> None:
        self._waiting = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait()  # the reply to an earlier request is under way
        else:
            self._refuse(408, f"the request's head did not come within {self.head_seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        logger.warning("a connection is closed: %s", message)
        # A reply that is under way must not have another one in its middle.
        if self.cycle is None or self.cycle.response_complete:
            body = ApiError(status, message).body
            self.transport.write(
                b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n%b" % (status, len(body), body)
            )
        self.transport.close()


def protocol(head_seconds: float, most_head_bytes: int) -> type[Protocol]:
    """The class for uvicorn, which makes its objects itself."""
    own = {
        "head_seconds": head_seconds, "most_head_bytes": most_head_bytes,
        "outbox": Outbox(), "arrivals": Arrivals(),
    }  # fmt: skip
    return type("Protocol", (Protocol,), own)
