"""What /openapi.json says of bodies and replies, which are read and written by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter

from reprise.server.fields import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from reprise.server.live.view import View
from reprise.server.responses.request import ResponsesRequest


def body(model: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI is to say of a request's body."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}


def responses(path: str) -> dict[int | str, dict[str, Any]]:
    """What comes back from a path."""
    kinds = {"/metrics": "text/plain", "/live": "text/event-stream"}
    found: dict[int | str, dict[str, Any]] = {200: {"description": "OK", "content": {}}}
    if path not in ("/health", "/ready", "/ping"):
        content: dict[str, Any] = {kinds.get(path, "application/json"): {}}
        if path.endswith(("completions", "/responses")):
            content["text/event-stream"] = {}
        found[200] = {"description": "OK", "content": content}
    if path == "/live":
        view = {"schema": {"$ref": "#/components/schemas/View"}}
        found[200]["content"] = {kinds[path]: view}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, told in (
        (400, "The request is not valid."), (401, "The API key is missing or wrong."),
        (404, "There is no such model, or response."), (405, "This path has other methods."),
        (408, "The request came too slowly."),
        (413, "The body is too large."), (415, "The body is not JSON."),
        (429, "Too many requests wait."), (499, "The request was aborted."),
        (500, "A defect of the server."), (503, "No engine takes requests now."),
    ):  # fmt: skip
        found[status] = {"description": told, "content": error}
    if path in ("/health", "/ready", "/ping"):
        found[503] = {"description": "It does not."}
    return found


def describe(app: FastAPI) -> None:
    """Bodies are read by hand, so their schemas are added by hand."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            schemas["Error"] = _ERROR
            for model in (
                CompletionRequest,
                ChatRequest,
                ResponsesRequest,
                TokenizeRequest,
                DetokenizeRequest,
                AbortRequest,
            ):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            view = TypeAdapter(View).json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(view.pop("$defs"))
            schemas["View"] = {**view, "description": "The data of each event of /live."}
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
