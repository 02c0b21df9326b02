"""Bodies of requests: read within limits, parsed, checked against a model of their fields."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from reprise.arguments import shown
from reprise.server.client import EngineRefusal
from reprise.server.errors import GONE_CLIENT, ApiError

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

MOST_DEPTH = 128
MOST_ERRORS = 10
MOST_NAMES = 20
_NAME = re.compile(r"[^A-Za-z0-9_.\[\]-]")
_logged: set[str] = set()
_MOST_LOGGED = 1000


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The whole body.

    Raises:
        ApiError: It is larger than ``limit`` bytes, or does not come within ``seconds``.
        EngineRefusal: The client is gone.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(seconds):
            return await _all(request, limit)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {seconds:.0f} s", headers={"Connection": "close"}
        ) from None


async def _all(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise EngineRefusal(GONE_CLIENT, "")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts) if len(parts) > 1 else part


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes (max_body_bytes)",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def parse(body: bytes, model: type[M]) -> M:
    """A JSON object as ``model``.

    Raises:
        ApiError: It is no such object.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is no JSON object")
    # Most bodies have too few brackets for that.
    if body.count(b"[") + body.count(b"{") > MOST_DEPTH and _deeper(found, MOST_DEPTH):
        raise ApiError(400, f"the body is nested more than {MOST_DEPTH} levels deep")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise invalid_fields(error) from None


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper; no recursion, which has a limit of its own."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def invalid_fields(error: ValidationError) -> ApiError:
    """What is wrong with a body, in few words."""
    found = error.errors(include_url=False, include_context=False)
    lines, first = [], None
    for each in found[:MOST_ERRORS]:
        place = ".".join(str(part) for part in each["loc"]) or "body"
        first = first or place
        if each["type"] == "missing":
            lines.append(f"{place} is missing")
        else:
            lines.append(f"{place}={shown(each['input'])}: {each['msg']}"[:500])
    if len(found) > MOST_ERRORS:
        lines.append(f"and {len(found) - MOST_ERRORS} more")
    return ApiError(400, "; ".join(lines), param=None if first is None else first[:200])


def ignored_header(names: list[str]) -> dict[str, str]:
    """Tells a client which fields changed nothing; each name is logged once."""
    if not names:
        return {}
    named = [_NAME.sub("?", each[:64]) for each in sorted(set(names))[:MOST_NAMES]]
    new = [each for each in named if each not in _logged and len(_logged) < _MOST_LOGGED]
    if new:
        _logged.update(new)
        logger.warning("fields of requests that are not known here are ignored: %s", ", ".join(new))
    more = len(set(names)) - len(named)
    return {"x-reprise-ignored-fields": ",".join(named) + (f",+{more}" if more > 0 else "")}
