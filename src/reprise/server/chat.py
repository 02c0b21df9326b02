"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson

from reprise.arguments import shown
from reprise.server.caller import Caller
from reprise.server.chat_choice import Choice
from reprise.server.client import EngineRefusal
from reprise.server.completions import check_length
from reprise.server.conversation import conversation
from reprise.server.errors import ABORTED, ApiError
from reprise.server.fields import ChatRequest, sampling
from reprise.server.generation import DONE, Reply
from reprise.server.logprobs import Position, chat_logprobs, prompt_logprobs
from reprise.server.options import ServerOptions
from reprise.server.reasoning import Splitter, begins_behind_thoughts, thinks_from_start
from reprise.server.streaming import Template
from reprise.server.tools.choice import tool_use

_NO_LOGPROBS = b'"logprobs":null,"finish_reason":null'


class Chat(Reply):
    """One request: what the engine is asked, and the reply.

    Args:
        request: Checked as far as its types go.
        name: Of the request, for clients.
        model: Name of the model, as asked for.
        fingerprint: Of the server.
        parser: Of reasoning, one of :data:`reprise.server.reasoning.PARSERS`.
        tool_parser: Of calls, one of :data:`reprise.server.tools.formats.PARSERS`, or ``none``.
        facts: Of the engine.
        defaults: Sampling values that the request may leave out.
        options: Of the server.
        strict_by_default: Schemas of tools that do not say ``strict`` are enforced, where they can
            be followed.
        most_tokens: Of the prompt, from which the oldest turns are left out as need be; None: a
            conversation that is too long is refused.

    Raises:
        ApiError: A field is not valid.
    """

    def __init__(
        self,
        request: ChatRequest,
        name: str,
        model: str,
        fingerprint: str,
        parser: str,
        tool_parser: str,
        facts: Mapping[str, Any],
        defaults: Mapping[str, Any],
        options: ServerOptions,
        strict_by_default: bool = False,
        most_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.request = request
        self._head = {
            "id": name,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        self._fingerprint = fingerprint
        self._parser = parser
        self._role = options.response_role
        ends, each = request.usage_in_stream
        self._usage_at_end, self.usage_each = ends or options.enable_force_include_usage, each
        n = request.n or 1
        if n > options.max_completions:
            raise ApiError(
                400, f"n={n}: at most {options.max_completions} (max_completions)", param="n"
            )
        chat, self.ignored, unfinished = conversation(request, facts, options)
        self._unfinished = unfinished
        self._use = tool_use(
            request.tools, request.tool_choice, request.parallel_tool_calls, tool_parser,
            strict_by_default,
        )  # fmt: skip
        params = sampling(request, defaults, **self._changes(facts, defaults))
        self._ask_for_calls(params)
        wanted = params.get("structured_outputs")
        if wanted is not None:
            where = begins_behind_thoughts(parser, facts["think_ids"], unfinished)
            if "begin_after" not in wanted:
                params["structured_outputs"] = {**wanted, **where}
        params["output_kind"] = "DELTA" if request.stream else "FINAL_ONLY"
        wants = []
        if request.return_token_ids:
            wants += ["prompt_ids", "ids"]
        if parser != "none":
            self.usage.reasoning = 0
            wants += ["tail", "sizes"]
        if most_tokens is not None:
            chat["most_tokens"] = most_tokens
        elif request.truncate_prompt_tokens is None:
            texts = sum(_length(each.get("content")) for each in chat["messages"])
            check_length(texts, "characters", facts, "messages")
        self.asks = [
            {
                "name": name,
                "prompt": None,
                "chat": chat,
                "params": params,
                "priority": request.priority or 0,
                "wants": wants,
            }
        ]
        kind = {"object": "chat.completion.chunk", "system_fingerprint": fingerprint}
        self._template = Template({**self._head, **kind}, self._usage_at_end)
        self._choices: dict[int, Choice] = {}
        self._facts: dict[str, Any] = {}

    def _changes(self, facts: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        request = self.request
        changes: dict[str, Any] = {}
        if request.max_completion_tokens is not None:
            changes["max_tokens"] = request.max_completion_tokens
        elif request.max_tokens is None:
            changes["max_tokens"] = defaults.get("max_tokens")  # None: what the context holds
        changes["logprobs"] = None
        top = request.top_logprobs
        if top is not None and not request.logprobs:
            raise ApiError(
                400, f"top_logprobs={top} and logprobs is not true", param="top_logprobs"
            )
        if request.logprobs:
            limit = facts["max_logprobs"]
            if (top or 0) > limit:
                raise ApiError(
                    400, f"top_logprobs={top}: give at most {limit}", param="top_logprobs"
                )
            changes["logprobs"] = top or 0
        return changes

    def _ask_for_calls(self, params: dict[str, Any]) -> None:
        use = self._use
        if use is None:
            return
        if use.parser.needs_special_tokens and self.request.skip_special_tokens is None:
            params["skip_special_tokens"] = False
        wanted = use.structured_outputs()
        if wanted is None:
            return
        if params.get("structured_outputs") is not None:
            if not use.required:
                return  # the text is what they say, and no call
            raise ApiError(
                400, f"tool_choice={shown(self.request.tool_choice)} and response_format or "
                "structured_outputs exclude each other", param="tool_choice",
            )  # fmt: skip
        params["structured_outputs"] = wanted

    def accepted(self, facts: list[dict[str, Any]]) -> None:
        """The engine has the prompt, and said what was wanted of it."""
        (self._facts,) = facts
        self.usage.prompt = self._facts["prompt_tokens"]

    def _choice(self, index: int) -> Choice:
        found = self._choices.get(index)
        if found is None:
            splitter = None
            if self._parser != "none":
                tail = self._facts.get("tail", "")
                splitter = Splitter(thinks_from_start(self._parser, tail, self._unfinished))
            found = self._choices[index] = Choice(splitter, self._use)
        return found

    # ---- plain -----------------------------------------------------------------------------

    async def reply(self, caller: Caller) -> dict[str, Any]:
        """The whole reply.

        Raises:
            EngineRefusal: The engine failed.
        """
        prompt: list[Any] = []
        outputs: list[Any] = []
        while self.end is None:
            for _, (_, new, end, positions) in await caller.next():
                outputs += new
                prompt = positions or prompt
                self._count(new, end)
        reply = {
            **self._head,
            "choices": [self._whole(each) for each in sorted(outputs, key=lambda each: each[0])],
            "usage": self.usage.to_dict(),
            "system_fingerprint": self._fingerprint,
            "service_tier": None,
        }
        if self.request.prompt_logprobs is not None:
            reply["prompt_logprobs"] = prompt_logprobs(prompt)
        if self.request.return_token_ids:
            reply["prompt_token_ids"] = self._facts["prompt_ids"]
        return reply

    def _whole(self, output: list[Any]) -> dict[str, Any]:
        index, text, _, finish, stop, more = output
        if finish == "abort":
            raise EngineRefusal(ABORTED, "")
        choice = self._choice(index)
        texts = {"content": "", "reasoning": ""}
        calls: list[dict[str, Any]] = []
        for kind, part in [*choice.feed(text), *choice.finish()]:
            if kind == "call":
                calls.append(choice.new_call(part))
            elif kind == "arguments":
                calls[-1]["function"]["arguments"] += part
            else:
                texts[kind] += part
        self._count_thoughts(choice, more)
        empty = bool(texts["reasoning"] or calls) and not texts["content"]
        message: dict[str, Any] = {
            "role": self._role,
            "content": None if empty else texts["content"],
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        finish = choice.finish_reason(finish)
        if texts["reasoning"] and self.request.include_reasoning is not False:
            message["reasoning"] = message["reasoning_content"] = texts["reasoning"]
        self.finish_reasons[index] = finish
        found = {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": finish,
            "stop_reason": stop,
        }
        if more is not None:
            if self.request.logprobs:
                found["logprobs"] = self._logprobs(more["logprobs"] or [])
            if self.request.return_token_ids:
                found["token_ids"] = more["ids"]
            if more["suspect_from"] is not None:
                found["suspect_from"] = more["suspect_from"]
        return found

    def _logprobs(self, positions: list[Position]) -> dict[str, Any]:
        as_ids = bool(self.request.return_tokens_as_token_ids)
        content = chat_logprobs(positions, self.request.top_logprobs or 0, as_ids)
        return {"content": content, "refusal": None}

    # ---- streamed --------------------------------------------------------------------------

    def around(self, number: int) -> list[bytes] | None:
        choice = self._choices.get(0)
        if choice is None or self._use is not None:
            return None
        if not (choice.begun and choice.answers):
            return None
        before, behind = b'"delta":{"content":', b"}," + _NO_LOGPROBS
        return self._template.around(0, before, behind, self.usage_each)

    def chunks(self, news: list[tuple[int, list[Any]]]) -> bytes:
        chunks: list[bytes] = []
        for _, (_, outputs, end, _) in news:
            for output in outputs:
                self._count([output], None)
                self._chunks(self._template, output, chunks)
            if end is not None:
                self._count([], end)
        if self.end is not None:
            self.complete = True
            if self._usage_at_end:
                chunks.append(self._template.usage(self.final_usage()))
            chunks.append(DONE)
        return b"".join(chunks)

    def _chunks(self, template: Template, output: list[Any], chunks: list[bytes]) -> None:
        index, text, count, finish, stop, more = output
        if finish == "abort":
            raise EngineRefusal(ABORTED, "")
        choice = self._choice(index)
        if not choice.begun:
            if count == 0 and finish is None:
                return
            choice.begun = True
            role = orjson.dumps(self._role)
            middle = b'"delta":{"role":%b,"content":""},' % role + _NO_LOGPROBS
            beside = b""
            if self.request.return_token_ids:
                beside = b',"prompt_token_ids":' + orjson.dumps(self._facts["prompt_ids"])
            chunks.append(template.chunk(index, middle, self.running_usage(), beside))
        parts = choice.feed(text)
        if finish is not None:
            parts += choice.finish()
        self._count_thoughts(choice, more)
        extra = b""
        if more is not None:
            choice.positions += more["logprobs"] or []
            if self.request.return_token_ids:
                extra += b',"token_ids":' + orjson.dumps(more["ids"])
            if more["suspect_from"] is not None:
                extra += b',"suspect_from":%d' % more["suspect_from"]
        for kind, part in parts:
            encoded = orjson.dumps(part)
            if kind == "call":
                call = orjson.dumps([{"index": choice.num_calls, **choice.new_call(part)}])
                delta = b'"delta":{"tool_calls":%b},' % call
            elif kind == "arguments":
                delta = b'"delta":{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]},' % (
                    choice.num_calls - 1, encoded,
                )  # fmt: skip
            elif kind == "content":
                delta = b'"delta":{"content":%b},' % encoded
            elif self.request.include_reasoning is False:
                continue
            else:
                delta = b'"delta":{"reasoning":%b,"reasoning_content":%b},' % (encoded, encoded)
            middle = delta + self._rest(choice) + extra
            extra = b""
            chunks.append(template.chunk(index, middle, self.running_usage()))
        if extra or (finish is not None and choice.positions):
            middle = b'"delta":{},' + self._rest(choice) + extra
            chunks.append(template.chunk(index, middle, self.running_usage()))
        if finish is not None:
            finish = choice.finish_reason(finish)
            self.finish_reasons[index] = finish
            middle = b'"delta":{},"logprobs":null,"finish_reason":"%b","stop_reason":%b' % (
                finish.encode(), orjson.dumps(stop),
            )  # fmt: skip
            chunks.append(template.chunk(index, middle, self.running_usage()))

    def _rest(self, choice: Choice) -> bytes:
        """Log probabilities that no chunk has had yet, and no finish reason."""
        if not choice.positions:
            return _NO_LOGPROBS
        positions, choice.positions = choice.positions, []
        return b'"logprobs":%b,"finish_reason":null' % orjson.dumps(self._logprobs(positions))

    # ---- both ------------------------------------------------------------------------------

    def _count(self, outputs: list[list[Any]], end: dict[str, Any] | None) -> None:
        self.usage.completion += sum(each[2] for each in outputs)
        if end is not None:
            self.usage.cached += end["cached"]
            self.end = end

    def _count_thoughts(self, choice: Choice, more: Mapping[str, Any] | None) -> None:
        """Behind the text of an output."""
        if choice.thoughts is not None and more is not None:
            before = choice.thoughts.count
            choice.thoughts.add(more["sizes"])
            self.usage.reasoning = (self.usage.reasoning or 0) + choice.thoughts.count - before


def _length(content: Any) -> int:
    """Characters of a message."""
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else []
    return sum(
        len(each["text"])
        for each in parts
        if isinstance(each, dict) and isinstance(each.get("text"), str)
    )
