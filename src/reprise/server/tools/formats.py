"""How families of models write tool calls."""

from __future__ import annotations

import re
from typing import Any, Literal

from reprise.server.tools.dsml import DeepSeekV4
from reprise.server.tools.json_text import read, written
from reprise.server.tools.parser import MOST_HEADER, JsonValue, ListParser, TaggedParser, ToolParser

_NAME_FIRST = re.compile(
    r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)
_FIRST_KEY = re.compile(r'\s*\{\s*"((?:[^"\\]|\\.)*)"')
_KEYS = ("name", "arguments", "parameters", "type", "id")


class _JsonCalls(TaggedParser):
    """Calls that are JSON objects with a name and arguments.

    Where the name comes first, arguments are given out as they come, as the model wrote them; else
    when the object is complete.
    """

    end: str

    def _entered(self) -> None:
        self._value: JsonValue | None = None
        self._late = False
        """There is no name that comes first."""
        self._whole = JsonValue()
        self._looked = 0
        """Characters of what is held that the object has had."""

    def _step_inside(self) -> bool:
        if self._value is not None:
            return self._step_arguments(self._value)
        head = self._held[:MOST_HEADER]
        header = None if self._late else _NAME_FIRST.match(head)
        if header is not None:
            self._call(_text(header[1]))
            self._value, self._held = JsonValue(), self._held[header.end() :]
            return True
        self._late = len(head) == MOST_HEADER
        return self._step_whole()

    def _step_arguments(self, value: JsonValue) -> bool:
        if not value.ended:
            count = value.feed(self._held)
            self._arguments(self._held[:count])
            self._held = self._held[count:]
        if not value.ended:
            return False
        # The object's brace, the tag, and nothing else between.
        place = self._held.find(self.end)
        if place >= 0:
            self._leave(self._held[place + len(self.end) :])
            return True
        if self._ended:
            self._held = ""
        return False

    def _step_whole(self) -> bool:
        """The name does not come first, or has not come yet."""
        begun = len(self._held) - len(self._held.lstrip())
        if self._held[begun : begun + 1] == "{" and not self._whole.ended:
            self._looked = max(self._looked, begun)
            self._looked += self._whole.feed(self._held[self._looked :])
        at = self._looked if self._whole.ended else begun
        place = self._held.find(self.end, at)
        complete = self._whole.ended or self._held[begun : begun + 1] not in ("", "{")
        if place < 0 or not complete:
            if self._ended:
                self._is_no_call(self._held, "")
            return False
        body, rest = self._held[:place], self._held[place + len(self.end) :]
        found = _call_in(body)
        if found is None:
            self._is_no_call(body + self.end, rest)
        else:
            self._call(found[0])
            self._arguments(found[1])
            self._leave(rest)
        return True


class Hermes(_JsonCalls):
    """``<tool_call>{"name": "f", "arguments": {...}}</tool_call>``, also of Qwen 2.5 and 3."""

    begin, end = "<tool_call>", "</tool_call>"


class DeepSeekV31(ListParser):
    """``<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{}<｜tool▁call▁end｜>``, between tags for all."""

    needs_special_tokens = True
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    first, middle, last = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

    def _entered(self) -> None:
        super()._entered()
        self._value: JsonValue | None = None
        self._late = False
        """The next call has no name."""

    def _step_inside(self) -> bool:
        value = self._value
        if value is not None:
            if not value.ended:
                count = value.feed(self._held)
                self._arguments(self._held[:count])
                self._held = self._held[count:]
            place = self._held.find(self.last)
            if value.ended and place >= 0:
                self._value, self._held = None, self._held[place + len(self.last) :]
                self._late = False
                return True
            return False
        head, form = self._held[:MOST_HEADER], rf"\s*{self.first}(.*?){self.middle}\s*(?=\S)"
        header = None if self._late else re.match(form, head, re.DOTALL)
        if header is not None:
            self._call(header[1].strip())
            self._value, self._held = JsonValue(), self._held[header.end() :]
            return True
        self._late = len(head) == MOST_HEADER
        return self._step_between()


class Qwen3Coder(TaggedParser):
    """``<function=NAME><parameter=KEY>value</parameter></function>`` between tags of a call.

    Arguments are made JSON by the tool's schema, a parameter when it is complete.
    """

    begin, end = "<tool_call>", "</tool_call>"
    _FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
    _PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>")
    # A value may have such tags in it: this one is followed by a parameter, or the function's end.
    _VALUE_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")

    def _entered(self) -> None:
        self._name: str | None = None
        self._key: str | None = None
        self._count = 0
        self._closed = False

    def _step_inside(self) -> bool:
        if self._name is None:
            return self._step_function()
        if self._key is not None:
            return self._step_value(self._name, self._key)
        if self._closed:
            place = self._held.find(self.end)
            if place >= 0:
                self._leave(self._held[place + len(self.end) :])
            elif self._ended:
                self._held = ""
            return place >= 0
        held = self._held.lstrip()
        found = self._PARAMETER.match(self._held)
        if found is not None:
            self._key, self._held = found[1].strip(), self._held[found.end() :]
            return True
        if held.startswith("</function>"):
            self._arguments("}" if self._count else "{}")
            self._closed, self._held = True, held[len("</function>") :]
            return True
        if self.end in held:  # the function's tag was left out
            self._arguments("}" if self._count else "{}")
            self._closed = True
            return True
        return False

    def _step_function(self) -> bool:
        found = self._FUNCTION.match(self._held)
        if found is not None:
            self._name, self._held = found[1].strip(), self._held[found.end() :]
            self._call(self._name)
            return True
        held, tag = self._held.lstrip(), "<function="
        if self._ended or not (tag.startswith(held) or held.startswith(tag)):
            self._is_no_call("", self._held)
            return True
        return False

    def _step_value(self, name: str, key: str) -> bool:
        found = self._VALUE_END.search(self._held)
        if found is None:
            return False
        value = self._held[: found.start()]
        value = value.removeprefix("\n").removesuffix("\n")
        schema = _properties(self.tools.get(name)).get(key)
        text = f"{written(key)}: {written(_typed(value, schema))}"
        self._arguments((", " if self._count else "{") + text)
        self._count += 1
        self._key, self._held = None, self._held[found.end() :]
        return True


class Llama3Json(ToolParser):
    """``{"name": "f", "parameters": {...}}``, several separated by ``;``, and nothing else: the
    whole output begins with a brace or with ``<|python_tag|>``."""

    needs_special_tokens = True
    tag = "<|python_tag|>"

    def __init__(self, tools: dict[str, Any]) -> None:
        super().__init__(tools)
        self._state: Literal["start", "call", "arguments", "end", "between", "content"] = "start"
        self._value = self._whole = JsonValue()
        self._looked = 0
        """Characters of what is held that the object of a call has had."""
        self._before = ""
        """What stood before the call that is looked for, to be given back if there is none."""

    def _step(self) -> bool:
        return {
            "start": self._step_start,
            "call": self._step_call,
            "arguments": self._step_arguments,
            "end": self._step_end,
            "between": self._step_between,
            "content": self._step_content,
        }[self._state]()

    def _step_content(self) -> bool:
        self._content(self._before + self._held)
        self._before = self._held = ""
        return False

    def _step_start(self) -> bool:
        held = self._held.lstrip()
        if held.startswith(self.tag):
            self._before = self._held[: len(self._held) - len(held)] + self.tag
            self._held = held[len(self.tag) :]
            self._look_for_call()
            return True
        if self.tag.startswith(held) and not self._ended:
            return False
        self._look_for_call()
        return True

    def _look_for_call(self) -> None:
        self._state, self._whole, self._looked = "call", JsonValue(), 0

    def _step_call(self) -> bool:
        head = self._held[:MOST_HEADER]
        header = _NAME_FIRST.match(head)
        if header is not None:
            self._call(_text(header[1]))
            self._before, self._held = "", self._held[header.end() :]
            self._value, self._state = JsonValue(), "arguments"
            return True
        held, key = self._held.lstrip(), _FIRST_KEY.match(head)
        other = bool(held) and held[0] != "{"
        other = other or (len(head) == MOST_HEADER if key is None else key[1] not in _KEYS)
        found, whole = None, self._whole
        if held and not other:
            self._looked = max(self._looked, len(self._held) - len(held))
            self._looked += whole.feed(self._held[self._looked :])
            found = _call_in(self._held[: self._looked]) if whole.ended else None
        if found is not None:
            self._call(found[0])
            self._arguments(found[1])
            self._before, self._held, self._state = "", self._held[self._looked :], "between"
            return True
        if other or whole.ended or self._ended:
            self._state = "content"
            return True
        return False

    def _step_arguments(self) -> bool:
        count = self._value.feed(self._held)
        self._arguments(self._held[:count])
        self._held = self._held[count:]
        if self._value.ended:
            self._state = "end"
        return self._value.ended

    def _step_end(self) -> bool:
        """The object's brace."""
        place = self._held.find("}")
        if place >= 0:
            self._held, self._state = self._held[place + 1 :], "between"
        return place >= 0

    def _step_between(self) -> bool:
        held = self._held.lstrip()
        if not held:
            return False
        self._state = "content"
        if held[0] == ";":
            self._before, self._held = ";", held[1:]
            self._look_for_call()
        return True


PARSERS: dict[str, type[ToolParser]] = {
    "hermes": Hermes,
    "qwen3": Hermes,
    "qwen3_coder": Qwen3Coder,
    "llama3_json": Llama3Json,
    "deepseek_v31": DeepSeekV31,
    "deepseek_v4": DeepSeekV4,
}
"""By what ``--tool-call-parser`` calls them."""


def _text(escaped: str) -> str:
    """A name; one that UTF-8 has not stays escaped."""
    try:
        name = str(read(f'"{escaped}"'))
        name.encode()
    except ValueError:
        return escaped
    return name


def _call_in(body: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is one JSON object; None: it is none."""
    try:
        found = read(body)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    return _text(written(found["name"])[1:-1]), written(arguments)


def _properties(schema: Any) -> dict[str, Any]:
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def _typed(value: str, schema: Any) -> Any:
    """A parameter's value by its schema."""
    kinds = _kinds(schema)
    if "null" in kinds and value.strip().lower() in ("null", "none"):
        return None
    if "string" in kinds:
        # White space around one of a few values is none of its own.
        return value.strip() if value.strip() in _listed(schema) else value
    try:
        return read(value)
    except ValueError:
        lowered = value.strip().lower()
        return {"true": True, "false": False}.get(lowered, value) if "boolean" in kinds else value


def _listed(schema: Any) -> list[Any]:
    """The values that a schema lists, if it lists any."""
    if not isinstance(schema, dict):
        return []
    found = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return found if isinstance(found, list) else []


def _kinds(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {each for each in given if isinstance(each, str)}
    for name in ("anyOf", "oneOf"):
        branches = schema.get(name)
        if isinstance(branches, list):
            return set().union(*(_kinds(each) for each in branches))
    values = _listed(schema)
    return {"string"} if values and all(isinstance(each, str) for each in values) else set()
