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

logger = logging.getLogger(__name__)

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


async def break_off(scope: Scope) -> None:
    """Drop a connection with all that waits in it: a client that reads nothing would hold it."""
    scope["state"]["gone"] = True
    # ASGI has no word for it: uvicorn's own object does.
    transport = getattr(getattr(scope["state"]["send"], "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()
        await asyncio.sleep(0)


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

    def chunk(self, index: int, middle: bytes, usage: bytes | None = None) -> bytes:
        """One with a choice.

        Args:
            index: Of the choice.
            middle: JSON of its other fields, without braces.
            usage: JSON.
        """
        begin = self._indexed.get(index)
        if begin is None:
            begin = self._indexed[index] = b'%b,"choices":[{"index":%d,' % (self._head, index)
        if usage is None:
            return b"%b%b}]%b" % (begin, middle, self._tail)
        return b'%b%b}],"usage":%b}\n\n' % (begin, middle, usage)

    def around(self, index: int, before: bytes, behind: bytes) -> tuple[bytes, bytes]:
        """A chunk whose middle is ``before``, something, ``behind``: what stands on either side."""
        head, _, tail = self.chunk(index, b"%b\0%b" % (before, behind)).partition(b"\0")
        return head, tail

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
        # In a task of its own, with the server's own way to send: each time it goes on, all calls
        # that lead to a coroutine are gone through, and an application has a dozen of them.
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pumping = asyncio.create_task(self._pump(scope["state"]))
        self._caller.task = pumping
        try:
            await pumping
        except asyncio.CancelledError:
            pumping.cancel()
            if not self._caller.stalled:
                raise
            await break_off(scope)
        finally:
            self._caller.close()
            self._reply.left()

    async def _pump(self, state: dict[str, Any]) -> None:
        caller, reply, send = self._caller, self._reply, state["send"]
        loop = asyncio.get_running_loop()
        size = 0
        await reply.announce()
        if begin := reply.begin():
            size += len(begin)
            await send({"type": "http.response.body", "body": begin, "more_body": True})
        while not reply.complete:
            try:
                news = caller.take()
                data = reply.chunks(news) if news else b""
            except EngineRefusal as refusal:
                if refusal.kind == GONE_CLIENT:
                    state["gone"] = True
                    return
                data = self._last(of_refusal(refusal, self._max_model_len))
            except Exception:
                logger.exception("a stream failed")
                data = self._last(ApiError(500, "internal error; the server's log says more"))
            if reply.complete:
                await reply.settle()
            if data:
                size += len(data)
                caller.sending_since = loop.time()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                caller.sending_since = None
            elif not news:
                await caller.bell.next()
        state["size"] = size
        await send({"type": "http.response.body", "body": b""})

    def _last(self, error: ApiError) -> bytes:
        """The status is out: an error is an event."""
        self._reply.complete = True
        return self._reply.failed(error)
