"""A body of ``POST /v1/responses``, and the chat that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reprise.arguments import shown
from reprise.neutral import is_neutral
from reprise.server.body import invalid_fields
from reprise.server.errors import ApiError
from reprise.server.fields import CONSTRAINTS, MEANINGLESS, ChatRequest
from reprise.server.responses.items import messages_of

_INPUT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "object"}},
    ]
}
LOGPROBS = "message.output_text.logprobs"


class ResponsesRequest(BaseModel):
    """Body of ``POST /v1/responses``."""

    model_config = ConfigDict(strict=True, extra="allow")
    input: Any = Field(json_schema_extra=_INPUT)
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0)
    include: list[str] | None = Field(None, max_length=64)
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: list[Any] | None = Field(None, max_length=512)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    truncation: Literal["auto", "disabled"] | None = None


_PASSED = frozenset(
    {
        "seed", "stop", "top_k", "min_p", "min_tokens", "ignore_eos", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "logit_bias", "stop_token_ids",
        "allowed_token_ids", "bad_words", "skip_special_tokens", "priority", "cache_salt",
        "chat_template_kwargs", "structured_outputs", "num_drafts",
    }
)  # fmt: skip
"""Fields beyond OpenAI's, as chats have them."""

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), "responses are computed while their client waits: stream=true"),
    "conversation": ((), "give previous_response_id, or all items in input"),
    "prompt": ((), "there are no stored prompts: give instructions and input"),
    "context_management": (([],), "give truncation='auto'"),
    "moderation": ((), "this server has no moderation"),
    "image": ((), "this model writes text alone"),
    "messages": ((), "give input"),
    "n": ((1,), "there is one response: send the request several times"),
    "max_tokens": ((), "give max_output_tokens"),
    "max_completion_tokens": ((), "give max_output_tokens"),
    "response_format": ((), "give text.format"),
    "logprobs": ((False,), f"give include=['{LOGPROBS}']"),
    **CONSTRAINTS,
}
"""Field to the values, beside null, at which it asks for nothing, and what to say at others."""
_OBJECTS: Mapping[str, frozenset[str]] = {
    "text": frozenset({"format", "verbosity"}),
    "reasoning": frozenset({"effort", "summary", "generate_summary"}),
    "stream_options": frozenset({"include_obfuscation"}),
}
"""Fields that are objects, and what of them is looked at."""
_OF_TOOLS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "allowed_callers": ((["direct"],), "tools are called by the model alone"),
    "async": ((False,), "its output is awaited"),
    "defer_loading": ((False,), "there is no search for tools: give those that may be called"),
    "output_schema": ((), "say in the description what it returns"),
}
"""As :data:`REFUSED`."""
_CHAT_NAMES = {
    "response_format": "text.format", "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
}  # fmt: skip
_INCLUDED = frozenset({LOGPROBS, "reasoning.encrypted_content"})
"""The second is for clients that keep a conversation themselves; reasoning is in the clear here."""
_KNOWN = MEANINGLESS | _PASSED | REFUSED.keys() | {"max_tool_calls", "stream_options"}


def check(request: ResponsesRequest) -> list[str]:
    """Names of fields that are ignored.

    Raises:
        ApiError: A field asks for something that this server does not have.
    """
    extra = request.model_extra or {}
    for name, value in extra.items():
        if name not in REFUSED:
            continue
        neutral, remedy = REFUSED[name]
        if not is_neutral(value, neutral):
            raise _invalid(name, value, remedy)
    for each in request.include or ():
        if each not in _INCLUDED:
            raise _invalid("include", each, f"this server knows {', '.join(sorted(_INCLUDED))}")
    options = extra.get("stream_options") or {}
    if not isinstance(options, dict) or options.get("include_obfuscation"):
        raise _invalid("stream_options", options, "events are not padded: leave it out")
    for name in ("summary", "generate_summary"):
        summary = (request.reasoning or {}).get(name)
        if summary not in (None, "auto"):
            raise _invalid(f"reasoning.{name}", summary, "reasoning is given whole: leave it out")
    logprobs = LOGPROBS in (request.include or ()) or request.top_logprobs
    if logprobs and request.tools:
        raise _invalid("include", [LOGPROBS], "calls have no log probabilities: leave out tools")
    ignored = [name for name, value in extra.items() if name not in _KNOWN and value is not None]
    objects = {"text": request.text, "reasoning": request.reasoning, "stream_options": options}
    for name, known in _OBJECTS.items():
        for key, value in (objects[name] or {}).items():
            if key not in known and value is not None:
                ignored.append(f"{name}.{key}")
    return ignored


def in_its_words(error: ApiError) -> ApiError:
    """An error of the chat that a request is answered by, with the request's names."""
    for name, ours in _CHAT_NAMES.items():
        if error.message.startswith(name):
            error.message = ours + error.message[len(name) :]
            error.param = ours
    return error


def chat_request(request: ResponsesRequest, items: Sequence[Mapping[str, Any]]) -> ChatRequest:
    """The chat.

    Args:
        request: As it came.
        items: The whole conversation.

    Raises:
        ApiError: A field is not valid.
    """
    extra = request.model_extra or {}
    logprobs = LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    effort = (request.reasoning or {}).get("effort")
    fields = {
        **{name: extra[name] for name in _PASSED if name in extra},
        "messages": messages_of(items, request.instructions),
        "model": request.model,
        "stream": request.stream,
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "logprobs": logprobs or None,
        "top_logprobs": request.top_logprobs if logprobs else None,
        "reasoning_effort": effort,
        "response_format": _format((request.text or {}).get("format")),
        "tools": _tools(request.tools),
        "tool_choice": _choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
    }
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise in_its_words(invalid_fields(error)) from None


def most_tokens(request: ResponsesRequest, facts: Mapping[str, Any]) -> int | None:
    """Of the prompt; None: it is not truncated. The answer has room for ``max_output_tokens``, or a
    quarter of the context, and at most for half of it."""
    if request.truncation != "auto":
        return None
    context = int(facts["max_model_len"])
    answer = request.max_output_tokens or context // 4
    return context - max(1, min(answer, context // 2))


def _format(form: Any) -> Any:
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    inner = {name: value for name, value in form.items() if name != "type"}
    return {"type": "json_schema", "json_schema": inner}


def _tools(tools: Sequence[Any] | None) -> list[Any] | None:
    found = []
    for number, each in enumerate(tools or ()):
        kind = each.get("type") if isinstance(each, dict) else None
        if kind != "function":
            raise _invalid(f"tools[{number}].type", kind, "this server has function tools alone")
        for name, (neutral, remedy) in _OF_TOOLS.items():
            if not is_neutral(each.get(name), neutral):
                raise _invalid(f"tools[{number}].{name}", each[name], remedy)
        function = {
            name: value
            for name, value in each.items()
            if name != "type" and name not in _OF_TOOLS and value is not None
        }
        found.append({"type": "function", "function": function})
    return found or None


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return choice
    return {"type": "function", "function": {"name": choice.get("name")}}


def _invalid(name: str, value: Any, remedy: str) -> ApiError:
    return ApiError(400, f"{name}={shown(value)}: {remedy}", param=name)
