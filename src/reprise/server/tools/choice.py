"""What a request's ``tools`` and ``tool_choice`` ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from reprise.arguments import shown
from reprise.errors import RequestError
from reprise.json_schema import check_schema
from reprise.server.errors import ApiError
from reprise.server.tools.formats import PARSERS
from reprise.server.tools.parser import TaggedParser, ToolParser
from reprise.structured_outputs import MAX_SOURCE

_SIGNS = (
    ("deepseek_v4", "<｜DSML｜tool_calls>"),
    ("qwen3_coder", "<function="),
    ("deepseek_v31", "<｜tool▁calls▁begin｜>"),
    ("hermes", "<tool_call>"),
    ("llama3_json", '"parameters":'),
    ("llama3_json", "<|python_tag|>"),
)
"""What the chat templates of families have in them."""


def parser_name(template: str) -> str:
    """The parser of the models that such a chat template is of; ``none`` if none is known."""
    return next((name for name, sign in _SIGNS if sign in template), "none")


_NAME = re.compile(r"[\w.:/@-]{1,256}")
"""Names of tools; the tags that calls are made of hold no others for all models."""
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function without parameters."""
_ANYTHING = {"type": "object"}
"""What a call's arguments are where nothing is enforced but the form of a call."""


@dataclass(frozen=True)
class ToolUse:
    """How calls are asked for and read."""

    parser: type[ToolParser]
    tools: dict[str, Any]
    """Parameters' schemas by name."""
    strict: frozenset[str]
    """Tools whose schema is enforced wherever they are called."""
    allowed: tuple[str, ...]
    """Tools that may be called."""
    named: bool
    """The one that is allowed has to be called, once."""
    required: bool
    parallel: bool
    """Several calls are wanted."""

    def reader(self) -> ToolParser:
        """A reader for one output."""
        return self.parser(self.tools)

    def structured_outputs(self) -> dict[str, Any] | None:
        """What holds of the output: it is calls and nothing else where they are required; else a
        call that is begun is one that is allowed. None: nothing does."""
        once = self.named or not self.parallel
        if self.required:
            schemas = {name: self.tools[name] for name in self.allowed}
            return {"structural_tag": _tag_of(only_calls(self.parser, schemas, once))}
        if not self.strict and len(self.allowed) == len(self.tools):
            return None
        schemas = {
            name: self.tools[name] if name in self.strict else _ANYTHING for name in self.allowed
        }
        form = calls_in_text(self.parser, schemas, once)
        found: dict[str, Any] = {"structural_tag": _tag_of(form)}
        if issubclass(self.parser, TaggedParser):
            # At once: a model that does not think would never come to it.
            found["begin_after"] = None
        return found


def strict_tools(tools: Sequence[Any], by_default: bool) -> frozenset[str]:
    """Names of those whose schema is enforced wherever they are called.

    Args:
        tools: As the chat API has them.
        by_default: So are those that do not say ``strict``, where their schema can be followed, as
            far as all of them together are no longer than one may be.

    Raises:
        ApiError: A tool is malformed.
    """
    known, found = _tools(tools), set()
    left = MAX_SOURCE
    for number, each in enumerate(tools):
        function = each["function"]
        name, strict = function["name"], function.get("strict")
        if strict is not None and not isinstance(strict, bool):
            raise ApiError(
                400, f"tools[{number}].function.strict={shown(strict)}: give true or false",
                param="tools",
            )  # fmt: skip
        if strict is None and by_default:
            # What is more than all schemas of a request may be is not even looked at.
            left -= len(orjson.dumps(known[name]))
            strict = left >= 0 and _can_be_followed(known[name])
        if strict:
            found.add(name)
    return frozenset(found)


def _can_be_followed(schema: Any) -> bool:
    try:
        check_schema(schema, "")
    except RequestError:
        return False
    return True


def tool_use(
    tools: Sequence[Any] | None,
    choice: Any,
    parallel: bool | None,
    parser: str,
    strict_by_default: bool = False,
) -> ToolUse | None:
    """
    Args:
        tools: As the chat API has them.
        choice: ``tool_choice``.
        parallel: ``parallel_tool_calls``.
        parser: One of :data:`PARSERS`, or ``none``.
        strict_by_default: As of :func:`strict_tools`.

    Returns:
        None if no calls are to be read.

    Raises:
        ApiError: The fields are malformed or contradict each other, or no parser is known.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(
                400, f"tool_choice={shown(choice)} and there are no tools", param="tool_choice"
            )
        return None
    known = _tools(tools)
    allowed, named, mode = tuple(known), False, choice
    if isinstance(choice, dict):
        named = choice.get("type") != "allowed_tools"
        mode, allowed = ("required", (_named(choice),)) if named else _allowed(choice)
        unknown = [each for each in allowed if each not in known]
        if unknown:
            raise ApiError(
                400, f"tool_choice={shown(choice)}: tools has no function of this name",
                param="tool_choice",
            )  # fmt: skip
    elif choice not in (None, "none", "auto", "required"):
        raise ApiError(
            400, f"tool_choice={shown(choice)}: give none, auto, required, or a function's name in "
            "an object", param="tool_choice",
        )  # fmt: skip
    if choice == "none":
        return None
    if parser == "none":
        raise ApiError(
            400,
            "tools: how this model writes tool calls is not known; start the server with "
            f"--tool-call-parser ({', '.join(PARSERS)}), or give tool_choice='none'",
            param="tools",
        )
    strict = strict_tools(tools, strict_by_default)
    return ToolUse(
        PARSERS[parser], known, strict, allowed, named, mode == "required", parallel is not False
    )


def _allowed(choice: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Mode and names of a choice that allows some tools, in the form of either API."""
    inner = choice.get("allowed_tools", choice)
    mode, tools = (inner.get(each) if isinstance(inner, dict) else None for each in _OF_ALLOWED)
    if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
        raise ApiError(
            400,
            f"tool_choice={shown(choice)}: give mode ('auto' or 'required') and tools, a list of "
            "functions' names in objects",
            param="tool_choice",
        )
    return mode, tuple(dict.fromkeys(_named(each) for each in tools))


def _named(choice: Any) -> str:
    if not isinstance(choice, dict):
        choice = {}
    inner = choice.get("function")
    name = inner.get("name") if isinstance(inner, dict) else choice.get("name")
    if choice.get("type") != "function" or not isinstance(name, str):
        raise ApiError(
            400,
            f"tool_choice={shown(choice)}: give an object with type 'function' and the function's "
            "name",
            param="tool_choice",
        )
    return name


def _tools(tools: Sequence[Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for number, each in enumerate(tools):
        function = each.get("function") if isinstance(each, dict) else None
        if not isinstance(function, dict) or each.get("type", "function") != "function":
            function = {}
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ApiError(
                400, f"tools[{number}]={shown(each)}: give a function with a name", param="tools"
            )
        if not _NAME.fullmatch(name):
            raise ApiError(
                400, f"tools[{number}].function.name={shown(name)}: give letters, digits, and "
                "_ - . : / @", param="tools",
            )  # fmt: skip
        schema = function.get("parameters")
        if schema is not None and not isinstance(schema, dict):
            raise ApiError(
                400, f"tools[{number}].function.parameters={shown(schema)}: give a JSON schema",
                param="tools",
            )  # fmt: skip
        kinds = (schema or {}).get("type", "object")
        if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
            raise ApiError(
                400, f"tools[{number}].function.parameters.type={shown(kinds)}: arguments are "
                "an object", param="tools",
            )  # fmt: skip
        if name in known:
            raise ApiError(400, f"tools has two functions {name!r}", param="tools")
        known[name] = schema or _NOTHING
    return known


def only_calls(parser: type[ToolParser], schemas: Mapping[str, Any], once: bool) -> dict[str, Any]:
    """A format of calls as the parser reads them, at least one, and nothing else.

    Args:
        parser: Of the calls.
        schemas: Parameters' by the names of those that may be called.
        once: There is one call.
    """
    form = _FORMS[parser.__name__]
    calls = _calls(form, schemas, once)
    if form.around is None:
        return calls
    before, behind = ({"type": "const_string", "value": each} for each in form.around)
    return {"type": "sequence", "elements": [before, calls, behind]}


def calls_in_text(
    parser: type[ToolParser], schemas: Mapping[str, Any], once: bool
) -> dict[str, Any]:
    """A format of any text, in which what the parser takes for a call is one of these.

    Args:
        parser, schemas, once: As of :func:`only_calls`; nothing comes behind one call.
    """
    form = _FORMS[parser.__name__]
    calls = _calls(form, schemas, once)
    if not issubclass(parser, TaggedParser):  # calls are the whole output: its begin tells
        return {"type": "or", "elements": [calls, {"type": "regex", "pattern": form.text}]}
    tags = calls["tags"]
    if form.around is not None:
        tags = [{"type": "tag", "begin": form.around[0], "content": calls, "end": form.around[1]}]
    return {
        "type": "triggered_tags",
        "triggers": [parser.begin],
        "tags": tags,
        "stop_after_first": once,
    }


def _calls(form: _Form, schemas: Mapping[str, Any], once: bool) -> dict[str, Any]:
    tags = []
    for name, schema in schemas.items():
        content: dict[str, Any] = {"type": "json_schema", "json_schema": schema}
        if form.style is not None:
            content["style"] = form.style
        spelled = json.dumps(name, ensure_ascii=False)[1:-1]
        tags.append(
            {
                "type": "tag",
                "begin": form.begin.replace("NAME", spelled if form.style is None else name),
                "content": content,
                "end": form.end,
            }
        )
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": form.separator,
        "at_least_one": True,
        "stop_after_first": once,
    }


def _tag_of(form: dict[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": form}


_OF_ALLOWED = ("mode", "tools")


@dataclass(frozen=True)
class _Form:
    begin: str
    """``NAME`` stands for the tool's."""
    end: str
    separator: str
    style: str | None = None
    """xgrammar's, of arguments that are no JSON."""
    around: tuple[str, str] | None = None
    """All calls."""
    text: str | None = None
    """Expression of texts that are no calls, where their begin alone tells."""


_FORMS = {
    "Hermes": _Form(
        '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", "\n"
    ),
    "Qwen3Coder": _Form(
        "<tool_call>\n<function=NAME>\n", "\n</function>\n</tool_call>", "\n", "qwen_xml"
    ),
    "Llama3Json": _Form(
        '{"name": "NAME", "parameters": ', "}", "; ", text=r"(<|([^{<\s]|<[^|])[\s\S]*)?"
    ),
    "DeepSeekV31": _Form(
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "",
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    "DeepSeekV4": _Form(
        '<｜DSML｜invoke name="NAME">\n',
        "</｜DSML｜invoke>\n",
        "",
        "deepseek_xml",
        around=("<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"),
    ),
}  # fmt: skip
"""How each parser's calls are asked for."""
