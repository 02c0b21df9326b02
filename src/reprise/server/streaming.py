"""Server-sent events: chunks made of templates, and the response that sends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from reprise.server.caller import Caller
from reprise.server.client import EngineRefusal
from reprise.server.errors import GONE_CLIENT, ApiError, error_event, of_refusal

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


async def _break_off(scope: Scope) -> None:
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

    def usage(self, usage: bytes) -> bytes:
        """The one that ends a stream."""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, usage)


class EventStream(Response):
    """Sends events as they come; its caller's requests end with it.

    Args:
        caller: Closed at the end.
        events: Raise an :class:`EngineRefusal` if a request fails.
        max_model_len: For messages of errors.
        headers: Of the reply.
    """

    def __init__(
        self,
        caller: Caller,
        events: AsyncIterator[bytes],
        max_model_len: int | None,
        headers: dict[str, str],
    ) -> None:
        super().__init__(None, 200, {**headers, **_HEADERS})
        del self.headers["content-length"]
        self._caller = caller
        self._events = events
        self._max_model_len = max_model_len
        self.gone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = self._caller
        caller.task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._safe_events(scope):
                caller.sending_since = loop.time()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                caller.sending_since = None
            await send({"type": "http.response.body", "body": b""})
        except asyncio.CancelledError:
            if not caller.stalled:
                raise
            await _break_off(scope)
        finally:
            caller.close()
            with contextlib.suppress(RuntimeError):
                await self._events.aclose()  # type: ignore[attr-defined]

    async def _safe_events(self, scope: Scope) -> AsyncIterator[bytes]:
        """The status is out: an error is an event."""
        try:
            async for each in self._events:
                yield each
        except EngineRefusal as refusal:
            if refusal.kind == GONE_CLIENT:
                self.gone = True
                scope["state"]["gone"] = True
                return
            yield error_event(of_refusal(refusal, self._max_model_len)) + DONE
        except Exception:
            logger.exception("a stream failed")
            yield error_event(ApiError(500, "internal error; the server's log says more")) + DONE
