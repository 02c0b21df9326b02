"""Errors as the OpenAI API tells them."""

from __future__ import annotations

import random
import re

import orjson
from starlette.responses import Response

from reprise.errors import RepriseError
from reprise.server.client import GONE, EngineRefusal

MOST_CHARACTERS = 2000
"""Of a message. What a client sent is quoted in it, and may be as long as a body."""

GONE_CLIENT = "ClientGone"
STOPPING = "Stopping"
ABORTED = "Aborted"
"""Kinds of :class:`EngineRefusal` that are made in an HTTP process."""

_PARAMETER = re.compile(r"([a-z_]{1,40}(?:\[\d+\]|\.[a-z_]{1,40})*)(?==| has | is | contains )")


class ApiError(Exception):
    """A request fails.

    Args:
        status: Of HTTP.
        message: For people.
        kind: ``type`` of the body; None: as the status says.
        code: For programs.
        param: The field at fault.
        headers: Of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _bounded(message)
        usual = "server_error" if status >= 500 else "invalid_request_error"
        self.kind = kind or _KINDS.get(status, usual)
        self.code = code
        self.param = param
        self.headers = headers or {}

    @property
    def body(self) -> bytes:
        """As JSON."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": error})

    @property
    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, "application/json")


_KINDS = {
    401: "authentication_error", 404: "not_found_error", 408: "timeout_error",
    429: "rate_limit_error", 503: "service_unavailable_error",
}  # fmt: skip


def invalid(error: RepriseError) -> ApiError:
    """Of a parameter; the message begins with its name."""
    message = str(error)
    found = _PARAMETER.match(message)
    return ApiError(400, message, param=found[1] if found else None)


def of_refusal(refusal: EngineRefusal, max_model_len: int | None) -> ApiError:
    """What the engine's process said, for a client."""
    message = re.sub(r" of request 'request-\d+(#\d+)?'", "", str(refusal))
    if refusal.kind in ("RequestError", "ConfigError"):
        return invalid(RepriseError(message))
    if refusal.kind == "CapacityError":
        known = f"This model's maximum context length is {max_model_len} tokens. "
        return ApiError(
            400,
            f"{known}However, you requested more: {message}",
            code="context_length_exceeded",
        )
    if refusal.kind == "QueueFull":
        # Not all that were refused at once come back at once.
        wait = {"Retry-After": str(random.randint(1, 3))}
        return ApiError(429, message, code="rate_limit_exceeded", headers=wait)
    if refusal.kind in (GONE, STOPPING, "RepriseError"):
        return unavailable(message)
    if refusal.kind == GONE_CLIENT:
        return ApiError(499, "the client has closed the connection", code="client_gone")
    if refusal.kind == ABORTED:
        return ApiError(499, "the request was aborted", code="request_aborted")
    if refusal.kind == "NonFiniteError":
        return ApiError(500, message, code="non_finite_logits")
    if refusal.kind == "GrammarError":
        return ApiError(500, message, code="grammar_left")
    # Messages of unexpected exceptions may show paths and addresses.
    return ApiError(
        500, f"the engine failed at this request ({refusal.kind}); the server's log says more"
    )


def unavailable(message: str) -> ApiError:
    """There is no engine, or not for new requests."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": "2"})


def internal_error(request_id: str) -> ApiError:
    """A fault of ours, whose exception the server's log has."""
    return ApiError(500, f"internal error; the server's log says more under {request_id}")


def _bounded(message: str) -> str:
    if len(message) > MOST_CHARACTERS:
        message = message[: MOST_CHARACTERS - 3] + "..."
    # What cannot be sent as UTF-8 is shown as it would be typed.
    return message.encode("utf-8", "backslashreplace").decode()


def error_event(error: ApiError) -> bytes:
    """The event for a stream whose status was sent."""
    return b"data: " + error.body + b"\n\n"
