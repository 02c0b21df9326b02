"""Messages and options of a chat as the engine's process takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reprise.arguments import shown
from reprise.server.errors import ApiError
from reprise.server.fields import ChatRequest, TokenizeRequest
from reprise.server.options import ServerOptions

_MESSAGE = {
    "role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations",
    "reasoning", "reasoning_content", "audio", "function_call",
}  # fmt: skip
_PART = {"type", "text", "refusal", "annotations"}
_NOT_HERE = ("chat_template", "tokenize", "tools", "documents")
"""Of ``chat_template_kwargs``: they have fields of their own, or decide what no client decides."""


def conversation(
    request: ChatRequest | TokenizeRequest, facts: Mapping[str, Any], options: ServerOptions
) -> tuple[dict[str, Any], list[str], str | None]:
    """Arguments of :func:`reprise.engine.chat_prompt`, keys of messages that are ignored, and the
    message that the output goes on with.

    Raises:
        ApiError: A field is not valid.
    """
    goes_on = bool(request.continue_final_message)
    prompted = request.add_generation_prompt
    if goes_on and prompted:
        raise ApiError(
            400,
            "continue_final_message=true and add_generation_prompt=true exclude each other",
            param="continue_final_message",
        )
    ignored: list[str] = []
    known = _MESSAGE | set(facts["message_names"] or ())
    messages = [
        _message(number, each, known, ignored) for number, each in enumerate(request.messages or ())
    ]
    chat: dict[str, Any] = {
        "messages": messages,
        "chat_template": _template(request, options),
        "chat_template_content_format": options.chat_template_content_format,
        "add_generation_prompt": not goes_on if prompted is None else prompted,
        "continue_final_message": goes_on,
        "tools": [_shown(each) for each in request.tools or ()] or None,
        "chat_template_kwargs": _variables(request, options),
    }
    if request.add_special_tokens:
        chat["add_special_tokens"] = True
    if isinstance(request, ChatRequest):
        chat["documents"] = request.documents or None
        if request.cache_salt is not None:
            chat["cache_salt"] = request.cache_salt
    last = messages[-1] if messages else None
    unfinished = None
    if goes_on and last is not None and isinstance(last.get("content"), str):
        unfinished = last["content"]
    return chat, ignored, unfinished


def _message(number: int, given: Any, known: set[str], ignored: list[str]) -> dict[str, Any]:
    """A message without what clients of other servers add; the rest is checked behind."""
    if not isinstance(given, dict):
        raise ApiError(400, f"messages[{number}]={shown(given)}: give an object", param="messages")
    ignored += [f"messages[].{key}" for key in given if key not in known]
    message = {key: value for key, value in given.items() if key in known}
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_part(each, ignored) for each in content]
    return message


def _shown(tool: Any) -> Any:
    """A tool as the template sees it: how its schema is enforced is the server's business, and what
    is null is not there."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        return tool
    named = {key: value for key, value in function.items() if key != "strict" and value is not None}
    return {**tool, "function": named}


def _part(given: Any, ignored: list[str]) -> Any:
    if not isinstance(given, dict) or given.get("type") not in (
        "text",
        "input_text",
        "output_text",
    ):
        return given
    ignored += [f"messages[].content[].{key}" for key in given if key not in _PART]
    return {key: value for key, value in given.items() if key in _PART}


def _template(request: ChatRequest | TokenizeRequest, options: ServerOptions) -> str | None:
    if request.chat_template is None:
        return options.template
    if not options.trust_request_chat_template:
        raise ApiError(
            400,
            "chat_template: this server takes no templates from requests "
            "(trust_request_chat_template)",
            param="chat_template",
        )
    return request.chat_template


def _variables(request: ChatRequest | TokenizeRequest, options: ServerOptions) -> dict[str, Any]:
    given = request.chat_template_kwargs or {}
    for name in _NOT_HERE:
        if name in given:
            raise ApiError(
                400, f"chat_template_kwargs has {name!r}: give the field of that name",
                param="chat_template_kwargs",
            )  # fmt: skip
    variables = {**options.default_chat_template_kwargs}
    effort = getattr(request, "reasoning_effort", None)
    if effort == "none":
        variables["enable_thinking"] = False
    elif effort is not None:
        variables["reasoning_effort"] = effort
    return {**variables, **given}
