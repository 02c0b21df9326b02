"""What stands before every request: its id, its key, its line in the log, its counts.

Raw ASGI, so that the application behind it reads the client's own messages.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from reprise.server.errors import ApiError, internal_error
from reprise.server.http_metrics import PROBES, HttpMetrics
from reprise.server.options import ServerOptions
from reprise.server.page import PAGE_PATHS

logger = logging.getLogger("reprise.server.access")
failures = logging.getLogger(__name__)

FREE = PAGE_PATHS | {"/health", "/ready", "/ping", "/version", "/metrics"}
"""Paths that need no key: probes and scrapers have none, and the page asks for one."""
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Gate:
    """The outermost application but for CORS.

    Args:
        app: What answers.
        options: Of the server.
        metrics: Counts replies.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: HttpMetrics) -> None:
        self._app = app
        self._keys = [hashlib.sha256(each.encode()).digest() for each in options.api_key]
        self._log = options.access_log
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = dict(scope["headers"])
        name = _request_id(headers.get(b"x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"] = name
        status = 0
        size = 0

        async def send_on(message: MutableMapping[str, Any]) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            if self._keys and not self._allowed(scope["method"], path, headers):
                error = ApiError(
                    401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
                await error.response(scope, receive, send_on)
            else:
                await self._app(scope, receive, send_on)
        except Exception:
            failures.exception("request %s to %s failed", name, scope["path"][:200])
            if status:
                raise  # the client learns from the broken connection
            await internal_error(name).response(scope, receive, send_on)
        finally:
            status = 499 if state.get("gone") else status or 499
            seconds = time.perf_counter() - began
            size = state.get("size", size)
            self._metrics.answered(scope["method"], path, status, seconds, size)
            if self._log and path not in PROBES:
                told = state.get("told")
                _log(scope, name, status, seconds, {} if told is None else told())

    def _allowed(self, method: str, path: str, headers: dict[bytes, bytes]) -> bool:
        if path in FREE or method == "OPTIONS":
            return True
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).digest()
        # All of them, whichever fits: the time tells nothing.
        return sum(hmac.compare_digest(digest, each) for each in self._keys) > 0


def _request_id(given: bytes | None) -> str:
    """The client's, if it is one; or a new one."""
    if given is not None and _ID.fullmatch(given):
        return given.decode()
    return os.urandom(16).hex()  # it cannot be guessed: it is the name of a stored response


def _log(scope: Scope, name: str, status: int, seconds: float, facts: dict[str, Any]) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    fields = {
        "request_id": name,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 4),
        **facts,
    }
    told = " ".join(f"{key}={value}" for key, value in facts.items())
    logger.info(
        "%s %s %d %.3f s %s %s", fields["method"], ascii(fields["path"])[1:-1], status, seconds,
        name, told, extra={"fields": fields},
    )  # fmt: skip
