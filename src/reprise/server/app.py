"""The endpoints."""

from __future__ import annotations

import time
from typing import Any

import orjson
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from reprise import __version__
from reprise.arguments import shown
from reprise.server.body import ignored_header, parse, read_body
from reprise.server.caller import Caller
from reprise.server.chat import Chat
from reprise.server.client import EngineRefusal
from reprise.server.completions import Completion
from reprise.server.conversation import conversation
from reprise.server.errors import GONE_CLIENT, ApiError, of_refusal
from reprise.server.fields import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    TokenizeRequest,
    refuse_what_is_not_here,
    unknown_names,
)
from reprise.server.gate import Gate
from reprise.server.http_metrics import HttpMetrics, exposition
from reprise.server.live.feed import Feed, LiveStream
from reprise.server.openapi import body, describe, responses
from reprise.server.page import add_page
from reprise.server.reasoning import CLOSE
from reprise.server.responses.input_items import page
from reprise.server.responses.items import items_of, unknown_keys
from reprise.server.responses.reply import Response as ModelResponse
from reprise.server.responses.request import ResponsesRequest, check
from reprise.server.responses.store import Stored, not_found
from reprise.server.state import ServerState
from reprise.server.streaming import EventStream
from reprise.server.tools.choice import parser_name


def create_app(state: ServerState, feed: Feed) -> ASGIApp:
    """The application of one HTTP process; ``feed`` has its live view."""
    options = state.options
    docs = not options.disable_fastapi_docs
    app = FastAPI(
        title="Reprise",
        version=__version__,
        root_path=options.root_path,
        docs_url="/docs" if docs else None,
        redoc_url="/redoc" if docs else None,
        openapi_url="/openapi.json" if docs else None,
    )
    handlers = Handlers(state, feed)
    handlers.register(app)
    if options.page:
        add_page(app, options.root_path)
    paths = [str(getattr(each, "path", "")) for each in app.routes]
    handlers.metrics = HttpMetrics(paths)
    gate: ASGIApp = Gate(app, options, handlers.metrics)
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


class Handlers:
    """One method for each endpoint."""

    metrics: HttpMetrics

    def __init__(self, state: ServerState, feed: Feed) -> None:
        self._state = state
        self._feed = feed
        self._started = int(time.time())

    def register(self, app: FastAPI) -> None:
        """Add the routes, and what makes errors of all others."""
        post: list[tuple[str, Any, type[BaseModel], str]] = [
            ("/v1/completions", self.completions, CompletionRequest, "Complete prompts."),
            ("/v1/chat/completions", self.chat, ChatRequest, "Answer a conversation."),
            ("/v1/responses", self.responses, ResponsesRequest, "Answer a list of items."),
            (
                "/v1/responses/input_tokens",
                self.count_input,
                ResponsesRequest,
                "How many tokens a list of items is.",
            ),
            ("/tokenize", self.tokenize, TokenizeRequest, "Token ids of a text or a conversation."),
            ("/detokenize", self.detokenize, DetokenizeRequest, "The text of token ids."),
            ("/abort", self.abort, AbortRequest, "End a running request by its id."),
        ]
        for path, handler, model, summary in post:
            app.add_api_route(
                path, handler, methods=["POST"], summary=summary, response_class=Response,
                responses=responses(path), openapi_extra=body(model),
            )  # fmt: skip
        app.add_api_route(
            "/v1/responses/compact", self.compact, methods=["POST"], include_in_schema=False
        )
        by_id: list[tuple[str, str, Any, str]] = [
            ("GET", "", self.response, "A response that was stored, or is under way."),
            ("GET", "/input_items", self.response_input, "What a response was computed from."),
            ("DELETE", "", self.delete_response, "Forget a response."),
            ("POST", "/cancel", self.cancel_response, "End a response that is under way."),
        ]
        for method, suffix, handler, summary in by_id:
            path = f"/v1/responses/{{response_id}}{suffix}"
            app.add_api_route(
                path, handler, methods=[method], summary=summary, response_class=Response,
                responses=responses(path),
            )  # fmt: skip
        get: list[tuple[str, Any, str]] = [
            ("/v1/models", self.models, "The model, under each of its names."),
            ("/v1/models/{name:path}", self.model, "One name of the model."),
            ("/health", self.health, "Whether the engine lives."),
            ("/ready", self.ready, "Whether new requests are taken."),
            ("/ping", self.health, "As /health."),
            ("/version", self.version, "Of Reprise."),
            ("/load", self.load, "Requests that are not finished."),
            ("/metrics", self.metric_text, "For Prometheus."),
            ("/graphs", self.graphs, "What is known of every captured graph."),
        ]
        if self._state.options.page:
            get.append(("/live", self.live, "Everything to watch, once a second, as events."))
        for path, handler, summary in get:
            methods = ["GET", "POST"] if path == "/ping" else ["GET"]
            app.add_api_route(
                path, handler, methods=methods, summary=summary, response_class=Response,
                responses=responses(path),
                include_in_schema=path != "/ping",
            )  # fmt: skip
        for path, handler in (
            ("/health", self.health),
            ("/ready", self.ready),
            ("/ping", self.health),
        ):
            app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
        app.add_exception_handler(ApiError, _tell)
        app.add_exception_handler(HTTPException, _tell_http)
        app.add_exception_handler(EngineRefusal, self._tell_refusal)
        describe(app)

    # ---- generation ------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        state = self._state
        asked, name, model = await self._generation(request, CompletionRequest, "cmpl")
        options = state.options
        work = Completion(
            asked, name, model, state.facts, state.sampling_defaults(), options.max_completions,
            options.enable_force_include_usage,
        )  # fmt: skip
        return await self._answer(request, asked, work, unknown_names(asked))

    async def chat(self, request: Request) -> Response:
        state = self._state
        asked, name, model = await self._generation(request, ChatRequest, "chatcmpl")
        work = Chat(
            asked, name, model, state.fingerprint, self._parser(), self._tool_parser(), state.facts,
            state.sampling_defaults(), state.options,
        )  # fmt: skip
        return await self._answer(request, asked, work, unknown_names(asked) + work.ignored)

    async def _generation(
        self, request: Request, kind: type[Any], prefix: str
    ) -> tuple[Any, str, str]:
        """The request, its name and its model's."""
        state = self._state
        state.check_open()
        asked: Generation = await self._read(request, kind)
        refuse_what_is_not_here(asked)
        name = f"{prefix}-{asked.request_id or request.state.request_id}"
        return asked, name, state.model_name(asked.model)

    async def _answer(
        self,
        request: Request,
        asked: Generation | ResponsesRequest,
        work: Completion | Chat,
        ignored: list[str],
    ) -> Response:
        state = self._state
        caller = Caller(state.client, state.callers, request.receive)
        request.state.told = work.told
        streaming = False
        try:
            caller.ask(work.asks)
            work.accepted(await caller.accepted())
            headers = ignored_header(ignored)
            if asked.stream:
                streaming = True
                limit = (state.client.facts or {}).get("max_model_len")
                return EventStream(caller, work, limit, headers)
            return _json(await work.reply(caller), headers)
        except EngineRefusal as refusal:
            if refusal.kind == GONE_CLIENT:
                request.state.gone = True
            raise
        finally:
            if not streaming:
                caller.close()
                work.left()

    def _parser(self) -> str:
        options = self._state.options
        if options.reasoning_parser != "auto":
            return options.reasoning_parser
        if options.template is not None:
            thinks = CLOSE in options.template
        else:
            thinks = bool(self._state.facts["thinks"])
        return "qwen3" if thinks else "none"

    def _tool_parser(self) -> str:
        options = self._state.options
        if options.tool_call_parser != "auto":
            return options.tool_call_parser
        if options.template is not None:
            return parser_name(options.template)
        return str(self._state.facts["tool_parser"])

    # ---- responses -------------------------------------------------------------------------

    async def responses(self, request: Request) -> Response:
        asked, work, ignored = await self._response(request)
        return await self._answer(request, asked, work, ignored)

    async def count_input(self, request: Request) -> Response:
        _, work, ignored = await self._response(request)
        asked_chat: Any = work.asks[0]["chat"]
        chat = {key: value for key, value in asked_chat.items() if key != "most_tokens"}
        found = await self._call(
            "tokenize", prompt=None, chat=chat, add_special_tokens=True, return_token_strs=False
        )
        counted = {"object": "response.input_tokens", "input_tokens": found["count"]}
        return _json(counted, ignored_header(ignored))

    async def compact(self, request: Request) -> Response:
        raise ApiError(400, "conversations are not compacted: give truncation='auto'")

    async def _response(
        self, request: Request
    ) -> tuple[ResponsesRequest, ModelResponse, list[str]]:
        """The request, what answers it, and names of what is ignored."""
        state = self._state
        state.check_open()
        asked: ResponsesRequest = await self._read(request, ResponsesRequest)
        ignored = check(asked)
        model = state.model_name(asked.model)
        before = []
        if asked.previous_response_id is not None:
            stored = await self._stored(asked.previous_response_id, "previous_response_id")
            before = orjson.loads(stored.items)
        keeps = asked.store is not False and state.options.response_store_bytes > 0
        items = items_of(asked.input)
        ignored += unknown_keys(items)
        work = ModelResponse(
            asked, before, items, state.client, keeps, model, state.fingerprint,
            self._parser(), self._tool_parser(), state.facts, state.sampling_defaults(),
            state.options,
        )  # fmt: skip
        return asked, work, ignored

    async def response(self, request: Request, response_id: str) -> Response:
        if request.query_params.get("stream", "false").lower() != "false":
            raise ApiError(
                400, "stream: events are not sent again: get the response", param="stream"
            )
        return _ready_json((await self._stored(response_id)).response)

    async def response_input(self, request: Request, response_id: str) -> Response:
        stored = await self._stored(response_id)
        items = orjson.loads(stored.items)[: stored.num_inputs]
        return _json(page(items, request.query_params))

    async def delete_response(self, response_id: str) -> Response:
        if not await self._call("response", action="delete", name=response_id):
            raise not_found(response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def cancel_response(self, response_id: str) -> Response:
        await self._stored(response_id)
        ended = await self._call("abort", name=response_id)
        known = orjson.loads((await self._stored(response_id)).response)
        if not ended:
            raise ApiError(
                400, f"the response is {known['status']}: there is nothing to cancel",
                param="response_id",
            )  # fmt: skip
        return _json({**known, "status": "cancelled"})

    async def _stored(self, name: str, param: str | None = None) -> Stored:
        found = await self._call("response", action="get", name=name)
        if found is None:
            raise not_found(name, param)
        return Stored(*found)

    # ---- beside it -------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        state = self._state
        asked = await self._read(request, TokenizeRequest)
        facts = state.facts
        state.model_name(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give prompt or messages, one of them", param="prompt")
        ignored = unknown_names(asked)
        chat = None
        if asked.messages is not None:
            chat, more, _ = conversation(asked, facts, state.options)
            ignored += more
        found = await self._call(
            "tokenize",
            prompt=asked.prompt,
            chat=chat,
            add_special_tokens=asked.add_special_tokens is not False,
            return_token_strs=bool(asked.return_token_strs),
        )
        return _json(found, ignored_header(ignored))

    async def detokenize(self, request: Request) -> Response:
        asked = await self._read(request, DetokenizeRequest)
        self._state.check_open()
        self._state.model_name(asked.model)
        text = await self._call("detokenize", tokens=asked.tokens)
        return _json({"prompt": text}, ignored_header(unknown_names(asked)))

    async def abort(self, request: Request) -> Response:
        asked = await self._read(request, AbortRequest)
        count = await self._call("abort", name=asked.request_id)
        if not count:
            raise ApiError(
                404, "no running request has this id", param="request_id", code="not_running"
            )
        return _json({"aborted": count}, ignored_header(unknown_names(asked)))

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._card(each) for each in self._names()]})

    async def model(self, name: str) -> Response:
        return _json(self._card(self._state.model_name(name if self._names() else None)))

    def _names(self) -> list[str]:
        if self._state.client.facts is None:
            self._state.check_open()
        return self._state.names

    def _card(self, name: str) -> dict[str, Any]:
        facts = self._state.client.facts or {}
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "reprise",
            "root": facts.get("model"),
            "parent": None,
            "max_model_len": facts.get("max_model_len"),
            "permission": [],
        }

    async def health(self) -> Response:
        """Liveness: draining is no reason to be restarted."""
        client = self._state.client
        alive = client.facts is not None and client.lost is None
        return Response(status_code=200 if alive else 503)

    async def ready(self) -> Response:
        state = self._state
        open_ = state.client.facts is not None and state.client.lost is None and not state.draining
        return Response(status_code=200 if open_ else 503)

    async def version(self) -> Response:
        return _json({"version": __version__})

    async def load(self) -> Response:
        return _json({"server_load": await self._call("load")})

    async def graphs(self) -> Response:
        return _json(await self._call("graphs"))

    async def live(self) -> Response:
        return LiveStream(self._feed, self._feed.join())

    async def metric_text(self) -> Response:
        facts = await self._call("metrics")
        text = exposition(facts, self._state.names[0], self.metrics.exposed())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # ---- shared ----------------------------------------------------------------------------

    async def _read(self, request: Request, model: type[Any]) -> Any:
        options = self._state.options
        kind = request.headers.get("content-type", "").partition(";")[0]
        # Other types, and none, are what pages of other origins may send without being asked.
        if kind.strip().lower() != "application/json":
            raise ApiError(415, "send JSON: Content-Type: application/json")
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise ApiError(415, f"Content-Encoding: {shown(encoding)}: send the body as it is")
        body = await read_body(request, options.max_body_bytes, options.body_timeout)
        return parse(body, model)

    async def _call(self, what: str, **arguments: Any) -> Any:
        """Ask the engine's process."""
        return await self._state.client.call(what, **arguments)

    async def _tell_refusal(self, _: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, EngineRefusal)
        limit = (self._state.client.facts or {}).get("max_model_len")
        return of_refusal(refusal, limit).response


def _json(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), 200, headers, "application/json")


def _ready_json(text: str) -> Response:
    return Response(text, 200, None, "application/json")


async def _tell(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _tell_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: "there is nothing at this path", 405: "this path has other methods"}
    message = told.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return ApiError(error.status_code, message, headers=headers).response
