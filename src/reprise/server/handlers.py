"""The endpoints: one method for each."""

from __future__ import annotations

import time
from typing import Any

import orjson
from fastapi import Request
from starlette.responses import Response

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
from reprise.server.http_metrics import HttpMetrics, exposition
from reprise.server.live.feed import Feed, LiveStream
from reprise.server.protocol import CONNECTION, Connection
from reprise.server.reasoning import CLOSE
from reprise.server.responses.input_items import page
from reprise.server.responses.items import items_of, unknown_keys
from reprise.server.responses.reply import Response as ModelResponse
from reprise.server.responses.request import ResponsesRequest, check
from reprise.server.responses.store import Stored, not_found
from reprise.server.state import ServerState
from reprise.server.streaming import EventStream
from reprise.server.tools.choice import parser_name


class Handlers:
    """What the endpoints do."""

    metrics: HttpMetrics

    def __init__(self, state: ServerState, feed: Feed) -> None:
        self._state = state
        self._feed = feed
        self._started = int(time.time())

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
        connection: Connection = request.scope["state"][CONNECTION]
        caller = Caller(state.client, state.callers, connection)
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
        chat = work.asks[0]["chat"]
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

    async def tell_refusal(self, _: Request, refusal: Exception) -> Response:
        """What a client is told of a request that the engine does not take."""
        assert isinstance(refusal, EngineRefusal)
        limit = (self._state.client.facts or {}).get("max_model_len")
        return of_refusal(refusal, limit).response


def _json(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), 200, headers, "application/json")


def _ready_json(text: str) -> Response:
    return Response(text, 200, None, "application/json")
