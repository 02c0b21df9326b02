"""The application of an HTTP process: its routes, and the gate before them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from reprise import __version__
from reprise.server.client import EngineRefusal
from reprise.server.errors import ApiError, internal_error
from reprise.server.fields import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from reprise.server.gate import Gate
from reprise.server.handlers import Handlers
from reprise.server.http_metrics import HttpMetrics
from reprise.server.live.feed import Feed
from reprise.server.openapi import body, describe, responses
from reprise.server.page import add_page
from reprise.server.responses.request import ResponsesRequest
from reprise.server.state import ServerState

Handler = Callable[[Request], Awaitable[Response]]


def create_app(state: ServerState, feed: Feed) -> ASGIApp:
    """The application of one HTTP process; ``feed`` has its live view."""
    options = state.options
    docs = not options.disable_fastapi_docs
    app = FastAPI(
        title="Reprise",
        version=__version__,
        docs_url="/docs" if docs else None,
        redoc_url="/redoc" if docs else None,
        openapi_url="/openapi.json" if docs else None,
    )
    # Its argument says that it is deprecated, for one of uvicorn's with another meaning.
    app.root_path = options.root_path
    handlers = Handlers(state, feed)
    posts = add_routes(app, handlers, page=options.page)
    if options.page:
        add_page(app, options.root_path)
    paths = [str(getattr(each, "path", "")) for each in app.routes]
    handlers.metrics = HttpMetrics(paths)
    short = {options.root_path + path: handler for path, handler in posts.items()}
    gate: ASGIApp = Gate(Endpoints(app, handlers, short), options, handlers.metrics)
    if options.allowed_origins:
        # Outermost: a refusal at the gate has its headers too.
        gate = CORSMiddleware(
            gate,
            allow_origins=options.allowed_origins,
            allow_methods=options.allowed_methods,
            allow_headers=options.allowed_headers,
            allow_credentials=options.allow_credentials,
            expose_headers=["x-request-id", "x-reprise-ignored-fields", "retry-after"],
        )
    return gate


class Endpoints:
    """Calls what answers a POST by its path. The framework, which describes these endpoints too and
    has all others, takes longer to come to one than most take to answer.

    Args:
        app: The framework's.
        handlers: What the endpoints do.
        posts: Of them, by path, as the server gets it.
    """

    def __init__(self, app: FastAPI, handlers: Handlers, posts: Mapping[str, Handler]) -> None:
        self._app = app
        self._handlers = handlers
        self._posts = posts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = None
        if scope["type"] == "http" and scope["method"] == "POST":
            handler = self._posts.get(scope["path"])
        if handler is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await handler(request)
        except ApiError as error:
            response = error.response
        except EngineRefusal as refusal:
            response = await self._handlers.tell_refusal(request, refusal)
        await response(scope, receive, send)


def add_routes(app: FastAPI, handlers: Handlers, *, page: bool) -> dict[str, Handler]:
    """A route for each endpoint (with ``page`` that of its live view too), and what makes errors of
    all others. Endpoints whose path alone says what is asked, by path."""
    post: list[tuple[str, Any, type[BaseModel], str]] = [
        ("/v1/completions", handlers.completions, CompletionRequest, "Complete prompts."),
        ("/v1/chat/completions", handlers.chat, ChatRequest, "Answer a conversation."),
        ("/v1/responses", handlers.responses, ResponsesRequest, "Answer a list of items."),
        (
            "/v1/responses/input_tokens",
            handlers.count_input,
            ResponsesRequest,
            "How many tokens a list of items is.",
        ),
        ("/tokenize", handlers.tokenize, TokenizeRequest, "Token ids of a text or a conversation."),
        ("/detokenize", handlers.detokenize, DetokenizeRequest, "The text of token ids."),
        ("/abort", handlers.abort, AbortRequest, "End a running request by its id."),
    ]
    for path, handler, model, summary in post:
        app.add_api_route(
            path, handler, methods=["POST"], summary=summary, response_class=Response,
            responses=responses(path), openapi_extra=body(model),
        )  # fmt: skip
    app.add_api_route(
        "/v1/responses/compact", handlers.compact, methods=["POST"], include_in_schema=False
    )
    by_id: list[tuple[str, str, Any, str]] = [
        ("GET", "", handlers.response, "A response that was stored, or is under way."),
        ("GET", "/input_items", handlers.response_input, "What a response was computed from."),
        ("DELETE", "", handlers.delete_response, "Forget a response."),
        ("POST", "/cancel", handlers.cancel_response, "End a response that is under way."),
    ]
    for method, suffix, handler, summary in by_id:
        path = f"/v1/responses/{{response_id}}{suffix}"
        app.add_api_route(
            path, handler, methods=[method], summary=summary, response_class=Response,
            responses=responses(path),
        )  # fmt: skip
    get: list[tuple[str, Any, str]] = [
        ("/v1/models", handlers.models, "The model, under each of its names."),
        ("/v1/models/{name:path}", handlers.model, "One name of the model."),
        ("/health", handlers.health, "Whether the engine lives."),
        ("/ready", handlers.ready, "Whether new requests are taken."),
        ("/ping", handlers.health, "As /health."),
        ("/version", handlers.version, "Of Reprise."),
        ("/load", handlers.load, "Requests that are not finished."),
        ("/metrics", handlers.metric_text, "For Prometheus."),
        ("/graphs", handlers.graphs, "What is known of every captured graph."),
    ]
    if page:
        get.append(("/live", handlers.live, "Everything to watch, once a second, as events."))
    for path, handler, summary in get:
        methods = ["GET", "POST"] if path == "/ping" else ["GET"]
        app.add_api_route(
            path, handler, methods=methods, summary=summary, response_class=Response,
            responses=responses(path),
            include_in_schema=path != "/ping",
        )  # fmt: skip
    for path, handler in (
        ("/health", handlers.health),
        ("/ready", handlers.ready),
        ("/ping", handlers.health),
    ):
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(EngineRefusal, handlers.tell_refusal)
    app.add_exception_handler(Exception, _tell_fault)
    describe(app)
    return {path: handler for path, handler, _, _ in post}


async def _tell(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _tell_fault(request: Request, _: Exception) -> Response:
    """Of ours: the framework, which raises it again behind this, would tell it in no form."""
    return internal_error(request.state.request_id).response


async def _tell_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: "there is nothing at this path", 405: "this path has other methods"}
    message = told.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return ApiError(error.status_code, message, headers=headers).response
