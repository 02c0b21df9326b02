"""Messages and tools of the OpenAI API, checked and put into the form that a template takes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from reprise.arguments import shown
from reprise.engine.prompt import short
from reprise.engine.template import Message, Renderer, ToolCallForm
from reprise.errors import RequestError

_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations",
            "reasoning", "reasoning_content"}  # fmt: skip
"""Keys of messages that come back from the OpenAI API and from servers that follow it."""
_REFUSED = {
    "audio": "this engine reads text alone",
    "function_call": "give tool_calls",
}
_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts, and the key that holds their text."""
_TOOL = {"type", "function"}
_FUNCTION = {"name", "description", "parameters", "strict"}
_TOOL_CALL = {"id", "type", "function", "index"}
_CALLED = {"name", "arguments"}


def read_messages(messages: Any, template: Renderer, content_format: str) -> list[Message]:
    """Messages as the template takes them.

    Raises:
        RequestError: A message is malformed, or has something that neither the OpenAI API nor the
            template knows; the message names the place.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages={short(messages)}: give a list of messages")
    if not messages:
        raise RequestError("messages is empty: give at least one message")
    return [
        _Reader(f"messages[{index}]", template, content_format).message(each)
        for index, each in enumerate(messages)
    ]


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as templates take them; None if there are none.

    Raises:
        RequestError: A tool is malformed.
    """
    if not tools:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"tools={short(tools)}: give a list of dictionaries")
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        _check(place, tool, _TOOL)
        _check_function(place, tool, _FUNCTION)
    return [{**each, "function": _present(each["function"])} for each in tools]


def _present(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is null is not there."""
    return {key: value for key, value in given.items() if value is not None}


class _Reader:
    """Reads one message.

    Args:
        place: Of the message, for errors.
        template: That it is read for.
        content_format: ``string``, ``openai`` or ``auto``.
    """

    def __init__(self, place: str, template: Renderer, content_format: str) -> None:
        self._place = place
        self._template = template
        self._format = content_format

    def message(self, given: Any) -> Message:
        place = self._place
        _check(place, given, _MESSAGE | _REFUSED.keys() | self._template.names)
        for key, why in _REFUSED.items():
            if given.get(key) is not None and key not in self._template.names:
                raise RequestError(f"{place} has the key {shown(key)}: {why}")
        read = _present(given)
        role = self._role(read.get("role"))
        calls = read.pop("tool_calls", None)
        content = read.pop("content", None)
        if content is None:
            content = read.get("refusal")
        if calls and not content:
            content = None
        if content is None and not calls and role != "assistant":
            raise RequestError(f"{place} has no content: give a string")
        read["role"] = role
        if content is not None:
            read["content"] = self._content(content, role)
        elif not calls:
            read["content"] = ""
        if calls:
            read |= self._calls(calls, beside_content=content is not None)
        self._rename_reasoning(read)
        return read

    def _role(self, role: Any) -> str:
        if not isinstance(role, str) or not role:
            raise RequestError(
                f"{self._place} has role={short(role)}: give one of {', '.join(_ROLES)}"
            )
        if role == "developer" and role not in self._template.names:
            return "system"  # the name that it had before
        plain = role.strip().lower()
        if role != plain and plain in (*_ROLES, "developer"):
            raise RequestError(f"{self._place} has role={short(role)}: give {plain!r}")
        if role not in _ROLES and not self._template.content_forms(role):
            raise RequestError(
                f"{self._place} has role={short(role)}, which the chat template drops: "
                f"give one of {', '.join(_ROLES)}"
            )
        return role

    def _content(self, content: Any, role: str) -> Any:
        if isinstance(content, str):
            texts = [content]
        elif isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
            texts = [self._part(index, each) for index, each in enumerate(content)]
        else:
            raise RequestError(f"{self._place}.content={short(content)}: give a string")
        given = "string" if isinstance(content, str) else "parts"
        wanted = {"string": "string", "openai": "parts", "auto": given}[self._format]
        forms = self._template.content_forms(role)
        if self._format == "auto" and forms and given not in forms:
            (wanted,) = forms
        elif self._format == "auto" and not forms:
            wanted = "string"
        if wanted == "string":
            return "\n".join(texts)
        return [{"type": "text", "text": each} for each in texts]

    def _part(self, index: int, part: Any) -> str:
        place = f"{self._place}.content[{index}]"
        if isinstance(part, str):
            return part
        if not isinstance(part, Mapping):
            raise RequestError(f'{place}={short(part)}: give {{"type": "text", "text": ...}}')
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _PARTS:
            raise RequestError(f"{place} is of type {short(kind)}: this engine reads text alone")
        key = _PARTS[kind]
        _check(
            place, part, {"type", key, "annotations"} if kind == "output_text" else {"type", key}
        )
        text = part.get(key)
        if not isinstance(text, str):
            raise RequestError(f"{place}.{key}={short(text)}: give a string")
        return text

    def _calls(self, calls: Any, beside_content: bool) -> Message:
        """Tool calls, and what says that there is no content if there is none."""
        place, form = f"{self._place}.tool_calls", self._template.tool_call_form
        if form is None:
            raise RequestError(f"{place}: the chat template does not show tool calls")
        if beside_content and not form.beside_content:
            raise RequestError(f"{place}: the chat template shows tool calls without content alone")
        if not beside_content and form.no_content is None:
            raise RequestError(f"{place}: the chat template shows tool calls beside content alone")
        read: Message = {"tool_calls": self._tool_calls(place, calls, form)}
        return read if beside_content else {**read, **(form.no_content or {})}

    def _tool_calls(self, place: str, calls: Any, form: ToolCallForm) -> list[dict[str, Any]]:
        if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
            raise RequestError(f"{place}={short(calls)}: give a list of tool calls")
        read = []
        for index, call in enumerate(calls):
            here = f"{place}[{index}]"
            _check(here, call, _TOOL_CALL | self._template.names)
            _check_function(here, call, _CALLED | self._template.names)
            arguments = _arguments(here, call["function"].get("arguments"), form)
            function = {**call["function"], "arguments": arguments}
            read.append({"type": "function", **call, "function": function})
        return read

    def _rename_reasoning(self, message: Message) -> None:
        """Servers and templates disagree on the name of what the model thought."""
        for name, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
            if name in message and name not in self._template.names:
                thought = message.pop(name)
                if other in self._template.names:
                    message.setdefault(other, thought)


def _arguments(place: str, given: Any, form: ToolCallForm) -> Any:
    """A tool call's arguments, which were given as a dictionary or as JSON of one."""
    place = f"{place}.function.arguments"
    arguments = {} if given is None or given == "" else given
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            if form.unparsed is None:
                raise RequestError(f"{place}={short(given)} is not valid JSON: {error}") from error
    if isinstance(given, str) and form.unparsed is not None and not isinstance(arguments, Mapping):
        arguments = {form.unparsed: given}
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{place}={short(given)}: give a JSON object")
    if form.as_dictionary:
        return dict(arguments)
    return given if isinstance(given, str) and given else json.dumps(arguments, ensure_ascii=False)


def _check(place: str, value: Any, known: Collection[str]) -> None:
    if not isinstance(value, Mapping):
        raise RequestError(f"{place}={short(value)}: give a dictionary")
    for key in value:
        if key not in known:
            raise RequestError(f"{place} has the unknown key {shown(key)}")


def _check_function(place: str, value: Mapping[str, Any], known: Collection[str]) -> None:
    kind, function = value.get("type", "function"), value.get("function")
    if kind != "function":
        raise RequestError(f"{place}.type={short(kind)}: give 'function'")
    if not isinstance(function, Mapping):
        raise RequestError(f'{place}.function={short(function)}: give {{"name": ...}}')
    _check(f"{place}.function", function, known)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{place}.function.name={short(name)}: give a string")
