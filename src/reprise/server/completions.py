"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson

from reprise.server.caller import Caller
from reprise.server.client import EngineRefusal
from reprise.server.errors import ABORTED, ApiError
from reprise.server.fields import CompletionRequest, sampling
from reprise.server.generation import DONE, Reply
from reprise.server.logprobs import CompletionLogprobs, fewer, prompt_logprobs
from reprise.server.streaming import Template

_TEXT_ALONE = b',"logprobs":null,"finish_reason":null,"stop_reason":null'


class Completion(Reply):
    """One request: what the engine is asked, and the reply.

    Args:
        request: Checked as far as its types go.
        name: Of the request, for clients.
        model: Name of the model, as asked for.
        facts: Of the engine.
        defaults: Sampling values that the request may leave out.
        most: Completions that it may ask for.
        force_usage: A stream ends with its usage in any case.

    Raises:
        ApiError: A field is not valid.
    """

    def __init__(
        self,
        request: CompletionRequest,
        name: str,
        model: str,
        facts: Mapping[str, Any],
        defaults: Mapping[str, Any],
        most: int,
        force_usage: bool,
    ) -> None:
        super().__init__()
        self.request = request
        self._head = {
            "id": name,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._n = request.n or 1
        self._echo = bool(request.echo)
        ends, each = request.usage_in_stream
        self._usage_at_end, self.usage_each = ends or force_usage, each
        prompts = _prompts(request.prompt)
        if len(prompts) * self._n > most:
            raise ApiError(
                400,
                f"n={self._n} for {len(prompts)} prompt(s): at most {most} completions of one "
                "request (max_completions)",
                param="n",
            )
        changes: dict[str, Any] = {}
        if request.logprobs is not None:
            _check_logprobs("logprobs", request.logprobs, facts)
            if self._echo:
                changes["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
        if request.prompt_logprobs is not None:
            _check_logprobs("prompt_logprobs", request.prompt_logprobs, facts)
        self._only_prompt = self._echo and request.max_tokens == 0
        if self._only_prompt:
            changes["max_tokens"] = 1  # an engine computes a prompt to draw a token
        known = {key: value for key, value in defaults.items() if key != "max_tokens"}
        params = sampling(request, known, **changes)
        params["output_kind"] = "DELTA" if request.stream else "FINAL_ONLY"
        wants = []
        if self._echo:
            wants.append("prompt")
        if request.return_token_ids:
            wants += ["prompt_ids", "ids"]
        self.asks = [
            {
                "name": name,
                "prompt": _prompt(each_prompt, request, facts),
                "chat": None,
                "params": params,
                "priority": request.priority or 0,
                "wants": wants,
            }
            for each_prompt in prompts
        ]
        as_ids = bool(request.return_tokens_as_token_ids)
        count = len(prompts) * self._n
        self._logprobs = [CompletionLogprobs(as_ids) for _ in range(count)]
        self._facts: list[dict[str, Any]] = []
        self._template = Template(self._head, self._usage_at_end)
        self._unfinished = len(prompts)
        self._echoed: set[int] = set()
        self._told: set[int] = set()
        """Choices of a stream that have had the ids of their prompt."""

    def accepted(self, facts: list[dict[str, Any]]) -> None:
        """The engine has the prompts, and said what was wanted of them."""
        self._facts = facts
        self.usage.prompt = sum(each["prompt_tokens"] for each in facts)

    # ---- plain -----------------------------------------------------------------------------

    async def reply(self, caller: Caller) -> dict[str, Any]:
        """The whole reply.

        Raises:
            EngineRefusal: The engine failed.
        """
        choices: list[dict[str, Any]] = []
        unfinished = len(caller.streams)
        while unfinished:
            for number, (_, outputs, end, prompt) in await caller.next():
                unfinished -= end is not None
                self._count(outputs, end)
                choices += [self._choice(number, each, prompt) for each in outputs]
        choices.sort(key=lambda each: int(each["index"]))
        return {
            **self._head,
            "choices": choices,
            "usage": self.usage.to_dict(),
        }

    def _choice(self, number: int, output: list[Any], prompt: Any) -> dict[str, Any]:
        index, text, _, finish, stop, more = output
        if finish == "abort":
            raise EngineRefusal(ABORTED, "")
        place = number * self._n + index
        facts, request = self._facts[number], self.request
        if self._only_prompt:
            text, more, finish, stop = "", None, "length", None
        positions = (more or {}).get("logprobs") or []
        logprobs = None
        if request.logprobs is not None:
            before = fewer(prompt, request.logprobs) if self._echo and prompt is not None else []
            logprobs = self._logprobs[place].take(
                [*before, *positions], facts.get("first", (0, ""))
            )
        self.finish_reasons[place] = finish
        choice = {
            "index": place,
            "text": (facts["prompt"] if self._echo else "") + text,
            "logprobs": logprobs,
            "finish_reason": finish,
            "stop_reason": stop,
        }
        if request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                fewer(prompt or [], request.prompt_logprobs)
            )
        if request.return_token_ids:
            choice["prompt_token_ids"] = facts["prompt_ids"]
            choice["token_ids"] = (more or {}).get("ids", [])
        if more is not None and more["suspect_from"] is not None:
            choice["suspect_from"] = more["suspect_from"]
        return choice

    # ---- streamed --------------------------------------------------------------------------

    def around(self, number: int) -> list[bytes] | None:
        place = number * self._n
        if self._only_prompt or (self._echo and place not in self._echoed):
            return None
        return self._template.around(place, b'"text":', _TEXT_ALONE, self.usage_each)

    def chunks(self, news: list[tuple[int, list[Any]]]) -> bytes:
        template = self._template
        chunks: list[bytes] = []
        for number, (_, outputs, end, prompt) in news:
            self._unfinished -= end is not None
            for output in outputs:
                place = number * self._n + output[0]
                self._count([output], None)
                if self._echo and place not in self._echoed:
                    self._echoed.add(place)
                    chunks.append(self._echo_chunk(template, number, place, prompt))
                if self._only_prompt:
                    output = [output[0], "", 0, "length", None, None]
                chunks += self._chunks(template, place, output)
            if end is not None:
                self._count([], end)
        if not self._unfinished:
            self.complete = True
            if self._usage_at_end:
                chunks.append(template.usage(self.final_usage()))
            chunks.append(DONE)
        return b"".join(chunks)

    def _echo_chunk(self, template: Template, number: int, place: int, prompt: Any) -> bytes:
        facts = self._facts[number]
        logprobs = b"null"
        if self.request.logprobs is not None:
            found = self._logprobs[place].take(prompt or [], facts.get("first", (0, "")))
            logprobs = orjson.dumps(found)
        middle = b'"text":%b,"logprobs":%b,"finish_reason":null,"stop_reason":null%b' % (
            orjson.dumps(facts["prompt"]), logprobs, self._prompt_ids(place),
        )  # fmt: skip
        return template.chunk(place, middle, self.running_usage())

    def _prompt_ids(self, place: int) -> bytes:
        """What the first chunk of a choice has of its prompt, if that is wanted."""
        if not self.request.return_token_ids or place in self._told:
            return b""
        self._told.add(place)
        facts = self._facts[place // self._n]
        return b',"prompt_token_ids":' + orjson.dumps(facts["prompt_ids"])

    def _chunks(self, template: Template, place: int, output: list[Any]) -> list[bytes]:
        _, text, _, finish, stop, more = output
        if finish == "abort":
            raise EngineRefusal(ABORTED, "")
        extra, logprobs = b"", b"null"
        found = []
        if more is not None:
            if more["logprobs"]:
                logprobs = orjson.dumps(self._logprobs[place].take(more["logprobs"]))
            if self.request.return_token_ids:
                extra += self._prompt_ids(place) + b',"token_ids":' + orjson.dumps(more["ids"])
            if more["suspect_from"] is not None:
                extra += b',"suspect_from":%d' % more["suspect_from"]
        if text or logprobs != b"null" or extra:
            middle = b'"text":%b,"logprobs":%b,"finish_reason":null,"stop_reason":null%b' % (
                orjson.dumps(text), logprobs, extra,
            )  # fmt: skip
            found.append(template.chunk(place, middle, self.running_usage()))
        if finish is not None:
            self.finish_reasons[place] = finish
            middle = b'"text":"","logprobs":null,"finish_reason":"%b","stop_reason":%b' % (
                finish.encode(), orjson.dumps(stop),
            )  # fmt: skip
            found.append(template.chunk(place, middle, self.running_usage()))
        return found

    # ---- both ------------------------------------------------------------------------------

    def _count(self, outputs: list[list[Any]], end: dict[str, Any] | None) -> None:
        if not self._only_prompt:
            self.usage.completion += sum(each[2] for each in outputs)
        if end is not None:
            self.usage.cached += end["cached"]
            self.end = end


def _prompts(given: Any) -> list[Any]:
    if given and _are_ids(given):
        return [given]
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not all(
        isinstance(each, str) or _are_ids(each) for each in prompts
    ):
        raise ApiError(
            400, "prompt: give a text, a list of texts, token ids, or a list of these",
            param="prompt",
        )  # fmt: skip
    if not prompts:
        raise ApiError(400, "prompt=[]: give at least one prompt", param="prompt")
    for each in prompts:
        if len(each) == 0:
            raise ApiError(400, "prompt is empty: give one token", param="prompt")
    return prompts


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _prompt(prompt: Any, request: CompletionRequest, facts: Mapping[str, Any]) -> Any:
    if request.truncate_prompt_tokens is None:
        unit = "characters" if isinstance(prompt, str) else "tokens"
        check_length(len(prompt), unit, facts, "prompt")
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    found = {key: prompt}
    if request.cache_salt is not None:
        found["cache_salt"] = request.cache_salt
    if request.add_special_tokens is False and isinstance(prompt, str):
        found["add_special_tokens"] = False
    return found


MOST_CHARACTERS_PER_TOKEN = 64
"""No tokenizer makes so few tokens of a text, but of one that only repeats itself."""


def check_length(length: int, unit: str, facts: Mapping[str, Any], param: str) -> None:
    """Refuse what cannot fit, before it is tokenized.

    Args:
        length: Of the prompt.
        unit: ``characters`` or ``tokens``.
        facts: Of the engine.
        param: Field of the prompt.

    Raises:
        ApiError: It cannot.
    """
    limit = int(facts["max_model_len"])
    if length > limit * (MOST_CHARACTERS_PER_TOKEN if unit == "characters" else 1):
        raise ApiError(
            400,
            f"This model's maximum context length is {limit} tokens. However, you requested a "
            f"prompt of {length} {unit}: shorten it",
            code="context_length_exceeded",
            param=param,
        )


def _check_logprobs(name: str, wanted: int, facts: Mapping[str, Any]) -> None:
    limit = int(facts["max_logprobs"])
    if wanted > limit:
        raise ApiError(
            400, f"{name}={wanted}: give at most {limit}, or raise the engine's max_logprobs",
            param=name,
        )  # fmt: skip
