"""Items of ``/v1/responses`` as messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reprise.arguments import shown
from reprise.server.errors import ApiError

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text")
_COMMON = frozenset({"type", "id", "status"})
_KEYS = {
    "message": _COMMON | {"role", "content", "phase"},
    "reasoning": _COMMON | {"content", "summary", "encrypted_content"},
    "function_call": _COMMON | {"call_id", "name", "arguments"},
    "function_call_output": _COMMON | {"call_id", "output"},
}
_PART_KEYS = frozenset({"type", "text", "refusal", "annotations", "logprobs"})


def items_of(given: Any) -> list[dict[str, Any]]:
    """``input`` as a list of items.

    Raises:
        ApiError: It is neither a text nor a list of objects.
    """
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise _invalid("input", given, "give a text, or a list of items")
    for number, each in enumerate(given):
        if not isinstance(each, dict):
            raise _invalid(f"input[{number}]", each, "give an object")
    return given


def unknown_keys(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of what items have that is not looked at."""
    found = []
    for item in items:
        kind = item.get("type", "message")
        if not isinstance(kind, str) or kind not in _KEYS:
            continue  # it is refused
        given = [key for key, value in item.items() if value is not None]
        found += [f"input[].{key}" for key in given if key not in _KEYS[kind]]
        for name in ("content", "output"):
            parts = item.get(name)
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict):
                    found += [f"input[].{name}[].{key}" for key in part if key not in _PART_KEYS]
    return found


def messages_of(items: Sequence[Mapping[str, Any]], instructions: str | None) -> list[Any]:
    """What an assistant reasoned, said and called in a row is one message.

    Args:
        items: Of the conversation.
        instructions: Stand before everything else.

    Raises:
        ApiError: An item is malformed, or of a kind that this server does not read.
    """
    messages: list[dict[str, Any]] = []
    for number, each in enumerate(items):
        _add(messages, f"input[{number}]", each)
    if instructions:
        first = messages[0] if messages else {}
        if first.get("role") in ("system", "developer"):
            # Many templates have room for one.
            messages[0] = {**first, "content": f"{instructions}\n\n{first['content']}"}
        else:
            messages.insert(0, {"role": "system", "content": instructions})
    return messages


def _add(messages: list[dict[str, Any]], place: str, item: Mapping[str, Any]) -> None:
    kind = item.get("type", "message")
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise _invalid(f"{place}.role", role, f"give one of {', '.join(_ROLES)}")
        text = _text(f"{place}.content", item.get("content"))
        if (
            role == "assistant"
            and last is not None
            and last.keys() == {"role", "reasoning_content"}
        ):
            last["content"] = text
        else:
            messages.append({"role": role, "content": text})
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list) or not all(
            isinstance(each, dict) and isinstance(each.get("text"), str) for each in parts
        ):
            raise _invalid(f"{place}.content", parts, "give a list of texts")
        if parts:  # else nothing of it can be read
            thought = "\n\n".join(each["text"] for each in parts)
            messages.append({"role": "assistant", "reasoning_content": thought})
    elif kind == "function_call":
        values = {name: item.get(name) for name in ("call_id", "name", "arguments")}
        _check_texts(place, values)
        if last is None:
            messages.append(last := {"role": "assistant", "content": None})
        last.setdefault("content", None)
        function = {"name": values["name"], "arguments": values["arguments"]}
        call = {"id": values["call_id"], "type": "function", "function": function}
        last.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        _check_texts(place, {"call_id": item.get("call_id")})
        output = _text(f"{place}.output", item.get("output"))
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
    else:
        raise _invalid(
            f"{place}.type", kind,
            "this server reads message, reasoning, function_call and function_call_output",
        )  # fmt: skip


def _check_texts(place: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(value, str):
            raise _invalid(f"{place}.{name}", value, "give a text")


def _text(place: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _invalid(place, content, "give a text, or a list of parts")
    texts = []
    for number, each in enumerate(content):
        kind = each.get("type") if isinstance(each, dict) else None
        name = "refusal" if kind == "refusal" else "text"
        if kind not in (*_TEXTS, "refusal") or not isinstance(each.get(name), str):
            raise _invalid(
                f"{place}[{number}]", each, "this model reads text alone: give input_text with text"
            )
        texts.append(each[name])
    return "\n".join(texts)


def _invalid(place: str, value: Any, remedy: str) -> ApiError:
    return ApiError(400, f"{place}={shown(value)}: {remedy}", param=place[:200])
