"""Server-sent events: chunks made of templates, and the response that sends them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from reprise.server.caller import Caller
from reprise.server.client import EngineRefusal
from reprise.server.errors import GONE_CLIENT, ApiError, of_refusal
from reprise.server.generation import Reply
from reprise.server.protocol import CONNECTION, Connection
from reprise.server.usage import Usage

logger = logging.getLogger(__name__)

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class Template:
    """Chunks of one stream: what never changes is encoded once.

    Args:
        head: Fields of every chunk before ``choices``.
        usage: ``"usage": null`` is a field of every chunk that has none.
    """

    def __init__(self, head: dict[str, Any], usage: bool) -> None:
        self._head = b"data: " + orjson.dumps(head)[:-1]
        self._tail = b',"usage":null}\n\n' if usage else b"}\n\n"
        self._indexed: dict[int, bytes] = {}

    def chunk(
        self, index: int, middle: bytes, usage: bytes | None = None, beside: bytes = b""
    ) -> bytes:
        """A chunk with a choice.

        Args:
            index: Of the choice.
            middle: JSON of its other fields, without braces.
            usage: JSON.
            beside: JSON of further fields of the chunk itself, each behind a comma.
        """
        begin = self._indexed.get(index)
        if begin is None:
            begin = self._indexed[index] = b'%b,"choices":[{"index":%d,' % (self._head, index)
        if usage is None:
            return b"%b%b}]%b%b" % (begin, middle, beside, self._tail)
        return b'%b%b}]%b,"usage":%b}\n\n' % (begin, middle, beside, usage)

    def around(self, index: int, before: bytes, behind: bytes, usage: bool) -> list[bytes]:
        """A chunk whose middle is ``before``, something, ``behind``, with its usage or without:
        what stands around them, two pieces or three."""
        blank = b"\0"
        middle = b"%b%b%b" % (before, blank, behind)
        return self.chunk(index, middle, blank if usage else None).split(blank)

    def usage(self, usage: bytes) -> bytes:
        """The one that ends a stream."""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, usage)


class EventStream(Response):
    """Sends events as they come; its caller's requests end with it.

    Args:
        caller: Closed at the end.
        reply: Makes the events.
        max_model_len: For messages of errors.
        headers: Of the reply.
    """

    def __init__(
        self, caller: Caller, reply: Reply, max_model_len: int | None, headers: dict[str, str]
    ) -> None:
        super().__init__(None, 200, {**headers, **STREAM_HEADERS})
        del self.headers["content-length"]
        self._caller = caller
        self._reply = reply
        self._max_model_len = max_model_len

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        connection: Connection = state[CONNECTION]
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # In a task of its own, which sends past all applications that this one is in: each time it
        # goes on, all calls that lead to a coroutine are gone through.
        pump = _Pump(self._caller, self._reply, self._max_model_len, connection)
        pumping = asyncio.create_task(pump.run())
        self._caller.task = pumping
        try:
            await pumping
        except asyncio.CancelledError:
            pumping.cancel()
            if not self._caller.stalled:
                raise
            state["gone"] = True
            await connection.abort()
        finally:
            state["size"] = pump.size
            if pump.gone:
                state["gone"] = True
            self._caller.close()
            self._reply.left()


class _Texts:
    """Sends the texts of one request that come alone, which is nearly all of them.

    Args:
        pump: Sends what else comes.
        around: Of :meth:`Reply.around`.
        usage: Of the reply.
    """

    __slots__ = ("_before", "_behind", "_end", "_pump", "_usage")

    def __init__(self, pump: _Pump, around: list[bytes], usage: Usage) -> None:
        self._pump = pump
        self._before, self._behind, *end = around
        self._end = end[0] if end else None
        """Behind the usage so far, where each chunk has it."""
        self._usage = usage

    def __call__(self, text: str, count: int) -> bool:
        """As of :attr:`Stream.texts`."""
        pump = self._pump
        if not pump.flowing or pump.connection.full:
            return False
        self._usage.completion += count
        if text:
            data = b"%b%b%b" % (self._before, orjson.dumps(text), self._behind)
            if self._end is not None:
                data = b"%b%b%b" % (data, self._usage.to_json(), self._end)
            pump.size += len(data)
            pump.connection.send_soon(data)
        return True


class _Pump:
    """Sends what comes.

    Between two pieces nothing is awaited but the end: news is written where it arrives, as long as
    the client reads. A task that is woken for each piece costs as much again as the piece.

    Args:
        caller: Whose news it is.
        reply: Makes pieces of it.
        max_model_len: For messages of errors.
        connection: Of the client, which has the reply's head.
    """

    __slots__ = (
        "_caller", "_ended", "_left", "_max_model_len", "_reply", "connection", "flowing", "gone",
        "size",
    )  # fmt: skip

    def __init__(
        self, caller: Caller, reply: Reply, max_model_len: int | None, connection: Connection
    ) -> None:
        self._caller = caller
        self._reply = reply
        self._max_model_len = max_model_len
        self.connection = connection
        self._left: asyncio.Future[bytes]
        """What :meth:`_write` does not send."""
        self._ended = False
        """The stream has sent everything."""
        self.flowing = False
        """All that came before was sent, or waits in the outbox."""
        self.size = 0
        """Bytes that were sent."""
        self.gone = False
        """The client is."""

    async def run(self) -> None:
        """Until the reply is complete."""
        reply = self._reply
        await reply.announce()
        await self._send(reply.begin())
        while not reply.complete:
            data = self._next() or await self._flow()
            if self._ended:
                self.connection.ended()
                return
            if self.gone:
                return
            if reply.complete:
                await reply.settle()
            await self._send(data)

    async def _send(self, data: bytes) -> None:
        more = not self._reply.complete
        if data or not more:
            self.size += len(data)
            self._caller.sending_since = asyncio.get_running_loop().time()
            await self.connection.send(data, more)
            self._caller.sending_since = None

    async def _flow(self) -> bytes:
        """Send all pieces but those that have to wait for something, which it returns."""
        if self._reply.complete:
            return b""
        self._left = asyncio.get_running_loop().create_future()
        self._caller.bell.listener = self._write
        self.flowing = True
        try:
            return await self._left
        finally:
            self._caller.bell.listener, self.flowing = None, False

    def _write(self) -> None:
        """There is news."""
        if self._left.done():
            return  # cancelled, or it has something to send; the task has not been told yet
        try:
            waits = self.connection.full
            data = b"" if waits else self._next()
            if data and not self._reply.complete:
                self.size += len(data)
                self.connection.send_soon(data)
                return
            if data and not self._reply.settles:
                # Streams that began together end together: each would wait until the tasks of all
                # before it have come to their end.
                self.size += len(data)
                self.connection.end_soon(data)
                self._ended = True
                data = b""
        except Exception as error:
            self.flowing = False
            self._left.set_exception(error)
            return
        if waits or self._reply.complete:
            self.flowing = False
            self._left.set_result(data)

    def _next(self) -> bytes:
        """Of the reply; empty: there is no news, as yet, or the client is gone."""
        try:
            # News may be no piece, as a text that is held back, and an error be behind it already,
            # of which no event would tell again.
            while news := self._caller.take():
                data = self._reply.chunks(news)
                for number, _ in news:
                    stream = self._caller.streams[number]
                    around = self._reply.around(number) if stream.texts is None else None
                    if around is not None:
                        stream.texts = _Texts(self, around, self._reply.usage)
                if data:
                    return data
            return b""
        except EngineRefusal as refusal:
            self.gone = refusal.kind == GONE_CLIENT
            error = of_refusal(refusal, self._max_model_len)
        except Exception:
            logger.exception("a stream failed")
            error = ApiError(500, "internal error; the server's log says more")
        self._reply.complete = True  # the status is out: an error is an event
        return b"" if self.gone else self._reply.failed(error)
