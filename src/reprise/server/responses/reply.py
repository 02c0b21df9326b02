"""``POST /v1/responses``: a chat whose reply is a response."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from reprise.server.caller import Caller
from reprise.server.chat import Chat
from reprise.server.client import EngineClient, EngineRefusal
from reprise.server.errors import ApiError
from reprise.server.options import ServerOptions
from reprise.server.responses.input_items import with_ids
from reprise.server.responses.output import Output
from reprise.server.responses.request import (
    ResponsesRequest,
    chat_request,
    in_its_words,
    most_tokens,
)
from reprise.server.tools.choice import strict_tools


class Response(Chat):
    """One response.

    Args:
        asked: The request.
        before: Items of the response that it goes on from.
        items: Those of the request.
        client: Of the engine, which keeps responses.
        keeps: It is kept when it has ended.
        model, fingerprint, parser, tool_parser, facts, defaults, options: As of :class:`Chat`.

    Raises:
        ApiError: A field is not valid.
    """

    def __init__(
        self,
        asked: ResponsesRequest,
        before: Sequence[dict[str, Any]],
        items: Sequence[dict[str, Any]],
        client: EngineClient,
        keeps: bool,
        model: str,
        fingerprint: str,
        parser: str,
        tool_parser: str,
        facts: Mapping[str, Any],
        defaults: Mapping[str, Any],
        options: ServerOptions,
    ) -> None:
        self.name = f"resp_{secrets.token_hex(24)}"
        self._conversation = [*before, *items]
        chat = chat_request(asked, self._conversation)
        most = most_tokens(asked, facts)
        by_default = bool(facts["structured"])
        try:
            super().__init__(
                chat, self.name, model, fingerprint, parser, tool_parser, facts, defaults, options,
                by_default, most,
            )  # fmt: skip
        except ApiError as error:
            raise in_its_words(error) from None
        use = self._use
        self._strict = strict_tools(chat.tools or (), by_default) if use is None else use.strict
        self._asked = asked
        self._client = client
        self._keeps = keeps
        self._known = False
        """The engine has heard of it."""
        self._output = Output()
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._completed_at: int | None = None
        self._suspect_from: int | None = None
        self._thoughts_passed = 0
        """Log probabilities of thoughts that were left out."""
        params: Any = self.asks[0]["params"]
        self._facts_of_request = self._echo(params)

    def _echo(self, params: Mapping[str, Any]) -> dict[str, Any]:
        asked = self._asked
        text, reasoning = asked.text or {}, asked.reasoning or {}
        return {
            "background": False,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._head["model"],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": reasoning.get("effort"), "summary": None},
            "service_tier": None,
            "store": self._keeps,
            "temperature": params.get("temperature", 1.0),
            "text": {**text, "format": text.get("format") or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [
                {**each, "strict": each["name"] in self._strict} for each in asked.tools or ()
            ],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": params.get("top_p", 1.0),
            "truncation": asked.truncation or "disabled",
        }

    def snapshot(self) -> dict[str, Any]:
        """As it is now."""
        over = self._status != "in_progress"
        reason = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        found = {
            "id": self.name,
            "object": "response",
            "created_at": self._head["created"],
            "completed_at": self._completed_at,
            "status": self._status,
            "error": self._error,
            "incomplete_details": reason,
            **self._facts_of_request,
            "output": self._output.items if over else [],
            "usage": self._usage() if over else None,
        }
        if self._suspect_from is not None:
            found["suspect_from"] = self._suspect_from
        return found

    def _usage(self) -> dict[str, Any]:
        usage = self.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
            "total_tokens": usage.prompt + usage.completion,
        }

    async def announce(self) -> None:
        # It is found by its name, whichever process is asked; in streams that is at the begin.
        self._known = True
        await self._tell(action="begin", response=self._json())

    settles = True

    async def settle(self) -> None:
        self._known = False
        kept: dict[str, Any] = {"action": "forget"}
        if self._keeps:
            items = with_ids([*self._conversation, *self._output.items])
            kept = {
                "action": "put",
                "response": self._json(),
                "items": orjson.dumps(items).decode(),
                "num_inputs": len(self._conversation),
            }
        await self._tell(**kept)

    async def _tell(self, **what: Any) -> None:
        with contextlib.suppress(EngineRefusal):  # an engine that has ended keeps nothing
            await self._client.call("response", name=self.name, **what)

    def left(self) -> None:
        if self._known:
            self._client.tell("response", action="forget", name=self.name)

    def _json(self) -> str:
        return orjson.dumps(self.snapshot()).decode()

    # ---- plain and streamed ----------------------------------------------------------------

    async def reply(self, caller: Caller) -> dict[str, Any]:
        while not self.complete:
            self._add(await caller.next())
            self._output.take_events()
        await self.settle()
        return self.snapshot()

    def begin(self) -> bytes:
        for name in ("response.created", "response.in_progress"):
            self._output.event(name, response=self.snapshot())
        return self._output.take_events()

    def chunks(self, news: list[tuple[int, list[Any]]]) -> bytes:
        self._add(news)
        return self._output.take_events()

    def failed(self, error: ApiError) -> bytes:
        self._output.close("incomplete")
        code = error.code or ("server_error" if error.status >= 500 else error.kind)
        self._error = {"code": code, "message": error.message}
        self._end("failed")
        return self._output.take_events()

    def _add(self, news: list[tuple[int, list[Any]]]) -> None:
        finish = None
        for _, (_, outputs, end, _) in news:
            for each in outputs:
                self._add_output(each)
                finish = each[3] or finish
            self._count([], end)
        if finish is not None:
            self.finish_reasons[0] = self._choice(0).finish_reason(finish)
            self._finish(finish)

    def _add_output(self, output: list[Any]) -> None:
        _, text, _, finish, _, more = output
        self._count([output], None)
        choice = self._choice(0)
        parts = choice.feed(text)
        if finish is not None:
            parts += choice.finish()
        self._count_thoughts(choice, more)
        if more is not None:
            choice.positions += more["logprobs"] or []
            if more["suspect_from"] is not None:
                self._suspect_from = more["suspect_from"]
        if finish is not None or not choice.thinks:
            # Log probabilities of thoughts have no place in a response.
            thoughts = (self.usage.reasoning or 0) - self._thoughts_passed
            passed = min(thoughts, len(choice.positions))
            del choice.positions[:passed]
            self._thoughts_passed += passed
        for kind, part in parts:
            if kind == "content":
                self._output.content(part, self._taken(choice.positions))
            elif kind == "reasoning":
                self._output.reasoning(part)
            elif kind == "call":
                self._output.call(part, choice.new_call(part)["id"])
            else:
                self._output.arguments(part)
        if finish is not None and (choice.positions or not self._output.items):
            self._output.content("", self._taken(choice.positions))

    def _taken(self, positions: list[Any]) -> list[Any]:
        if not positions:
            return []
        found = self._logprobs(positions)["content"]
        positions.clear()
        return list(found)

    def _finish(self, finish: str) -> None:
        status = {"length": "incomplete", "abort": "cancelled"}.get(finish, "completed")
        self._output.close("completed" if status == "completed" else "incomplete")
        self._end(status)

    def _end(self, status: str) -> None:
        self._status, self.complete = status, True
        self._completed_at = int(time.time()) if status == "completed" else None
        # There is no event of a cancelled one.
        event = "incomplete" if status == "cancelled" else status
        self._output.event(f"response.{event}", response=self.snapshot())
