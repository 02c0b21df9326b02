"""What a request's ``tools`` and ``tool_choice`` ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reprise.arguments import shown
from reprise.server.errors import ApiError
from reprise.server.tools.formats import PARSERS
from reprise.server.tools.parser import ToolParser

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


MAX_WHITE_SPACE = 16
"""Characters of white space in a row, in arguments: models that are lost write it without end."""
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function without parameters."""


@dataclass(frozen=True)
class ToolUse:
    """How calls are asked for and read."""

    parser: type[ToolParser]
    tools: dict[str, Any]
    """Parameters' schemas by name."""
    named: str | None
    """The one tool that has to be called."""
    required: bool
    parallel: bool
    """Several calls are wanted."""

    def reader(self) -> ToolParser:
        """For one output."""
        return self.parser(self.tools)

    def structured_outputs(self) -> dict[str, Any] | None:
        """By which the output is calls and nothing else; None: the model chooses."""
        if not self.required:
            return None
        names = list(self.tools) if self.named is None else [self.named]
        once = self.named is not None or not self.parallel
        return {"structural_tag": _grammar(self.parser, self.tools, names, once)}


def tool_use(
    tools: Sequence[Any] | None, choice: Any, parallel: bool | None, parser: str
) -> ToolUse | None:
    """
    Args:
        tools: As the chat API has them.
        choice: ``tool_choice``.
        parallel: ``parallel_tool_calls``.
        parser: One of :data:`PARSERS`, or ``none``.

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
    named = None
    if isinstance(choice, dict):
        named = _named(choice)
        if named not in known:
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
    required = choice == "required" or named is not None
    return ToolUse(PARSERS[parser], known, named, required, parallel is not False)


def _named(choice: Mapping[str, Any]) -> str:
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
        schema = function.get("parameters")
        if schema is not None and not isinstance(schema, dict):
            raise ApiError(
                400, f"tools[{number}].function.parameters={shown(schema)}: give a JSON schema",
                param="tools",
            )  # fmt: skip
        if name in known:
            raise ApiError(400, f"tools has two functions {name!r}", param="tools")
        known[name] = schema or _NOTHING
    return known


def _grammar(
    parser: type[ToolParser], tools: Mapping[str, Any], names: Sequence[str], once: bool
) -> dict[str, Any]:
    """A structural tag of calls as the parser reads them."""
    form = _FORMS[parser.__name__]
    tags = []
    for name in names:
        content: dict[str, Any] = {
            "type": "json_schema",
            "json_schema": tools[name],
            "max_whitespace_cnt": MAX_WHITE_SPACE,
        }
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
    calls: dict[str, Any] = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": form.separator,
        "at_least_one": True,
        "stop_after_first": once,
    }
    if form.around is not None:
        before, behind = ({"type": "const_string", "value": each} for each in form.around)
        calls = {"type": "sequence", "elements": [before, calls, behind]}
    return {"type": "structural_tag", "format": calls}


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


_FORMS = {
    "Hermes": _Form(
        '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", "\n"
    ),
    "Qwen3Coder": _Form(
        "<tool_call>\n<function=NAME>\n", "\n</function>\n</tool_call>", "\n", "qwen_xml"
    ),
    "Llama3Json": _Form('{"name": "NAME", "parameters": ', "}", "; "),
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
