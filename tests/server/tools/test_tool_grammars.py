"""What a grammar lets a model write is what the parser of its family reads, with the tools' own
schemas."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from reprise.server.errors import ApiError
from reprise.server.tools.choice import calls_in_text, only_calls, tool_use
from reprise.server.tools.formats import PARSERS
from reprise.structured_outputs import MAX_SOURCE

xgrammar = pytest.importorskip("xgrammar")

END = 256
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1,
                   "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}  # fmt: skip
GOOD: dict[str, Any] = {"city": "Rome", "days": 2}
BAD: list[dict[str, Any]] = [{"city": "Paris", "days": 2}, {"city": "Rome", "days": 99}, {}]

Write = Callable[[str, dict[str, Any]], str]


def _parameters(form: str, arguments: dict[str, Any]) -> str:
    return "".join(
        form.format(name=name, value=value, text=str(isinstance(value, str)).lower())
        for name, value in arguments.items()
    )


WRITTEN: dict[str, Write] = {
    "hermes": lambda name, arguments: (
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
    ),
    "llama3_json": lambda name, arguments: (
        f'{{"name": "{name}", "parameters": {json.dumps(arguments)}}}'
    ),
    "qwen3_coder": lambda name, arguments: (
        f"<tool_call>\n<function={name}>\n"
        + _parameters("<parameter={name}>\n{value}\n</parameter>\n", arguments).removesuffix("\n")
        + "\n</function>\n</tool_call>"
    ),
    "deepseek_v31": lambda name, arguments: (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(arguments)}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v4": lambda name, arguments: (
        f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n'
        + _parameters(
            '<｜DSML｜parameter name="{name}" string="{text}">{value}</｜DSML｜parameter>\n',
            arguments,
        )
        + "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    ),
}


@pytest.fixture(scope="module")
def allows() -> Callable[[dict[str, Any], str], bool]:
    """Whether a whole text is of a format."""
    letters = [f"<0x{each:02X}>" if each > 127 else chr(each) for each in range(256)]
    info = xgrammar.TokenizerInfo(
        [*letters, "</s>"], vocab_type=xgrammar.VocabType.BYTE_FALLBACK, vocab_size=257,
        stop_token_ids=[END],
    )  # fmt: skip
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)

    def run(form: dict[str, Any], text: str) -> bool:
        tag = {"type": "structural_tag", "format": form}
        matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(tag))
        return bool(matcher.accept_string(text) and matcher.accept_token(END))

    return run


@pytest.mark.parametrize("family", WRITTEN)
def test_a_call_in_a_text_follows_its_schema(
    family: str, allows: Callable[[dict[str, Any], str], bool]
) -> None:
    write, parser = WRITTEN[family], PARSERS[family]
    whole_output = family == "llama3_json"
    before = "" if whole_output else "I look it up.\n"
    strict = calls_in_text(parser, {"get_weather": SCHEMA}, once=False)
    loose = calls_in_text(parser, {"get_weather": {"type": "object"}}, once=False)
    call = before + write("get_weather", GOOD)
    reader = parser({"get_weather": SCHEMA})
    events = [*reader.feed(call), *reader.finish()]
    assert json.loads("".join(text for kind, text in events if kind == "arguments")) == GOOD
    for form in (strict, loose):
        assert allows(form, call)
        assert not allows(form, before + write("now", GOOD))
        for text in ("", "It rains.\n\n{x} <b>", "<", "[1]"):
            assert allows(form, text)
    for arguments in BAD:
        assert not allows(strict, before + write("get_weather", arguments))
        assert allows(loose, before + write("get_weather", arguments))
    again = ("; " if whole_output else "\n") + write("get_weather", GOOD)
    once = calls_in_text(parser, {"get_weather": SCHEMA}, once=True)
    assert allows(strict, call + again)
    assert allows(once, call)
    assert not allows(once, call + again)


@pytest.mark.parametrize("family", WRITTEN)
def test_calls_alone_follow_their_schema(
    family: str, allows: Callable[[dict[str, Any], str], bool]
) -> None:
    form = only_calls(PARSERS[family], {"get_weather": SCHEMA}, once=False)
    write = WRITTEN[family]
    assert allows(form, write("get_weather", GOOD))
    assert not any(allows(form, write("get_weather", each)) for each in BAD)
    assert not any(allows(form, each) for each in ("", "It rains.", write("now", GOOD)))


def _tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


NAMES = [{"type": "function", "function": {"name": "b"}}, {"type": "function", "name": "b"}]


def test_what_is_enforced_is_what_is_asked_for() -> None:
    tools = [_tool("a", strict=True), _tool("b"), _tool("c", strict=False)]

    def schemas(choice: Any, given: Any = tools, default: bool = False) -> dict[str, Any] | None:
        use = tool_use(given, choice, None, "hermes", default)
        wanted = None if use is None else use.structured_outputs()
        if wanted is None:
            return None
        form = wanted["structural_tag"]["format"]
        found = {
            each["begin"].split('"')[3]: each["content"]["json_schema"] for each in form["tags"]
        }
        return {"kind": form["type"], **found}

    free, calls, anything = "triggered_tags", "tags_with_separator", {"type": "object"}
    assert schemas("auto") == {"kind": free, "a": SCHEMA, "b": anything, "c": anything}
    assert schemas("auto", tools[1:]) is None
    assert schemas("auto", default=True) == {"kind": free, "a": SCHEMA, "b": SCHEMA, "c": anything}
    assert schemas("auto", tools[2:], default=True) is None
    assert schemas("none") is None
    assert schemas("required") == {"kind": calls, "a": SCHEMA, "b": SCHEMA, "c": SCHEMA}
    for name in NAMES:
        inner = {"mode": "auto", "tools": [name]}
        for choice in ({"type": "allowed_tools", **inner},
                       {"type": "allowed_tools", "allowed_tools": inner}):  # fmt: skip
            assert schemas(choice) == {"kind": free, "b": anything}
        required = {"type": "allowed_tools", "mode": "required", "tools": [name]}
        assert schemas(required) == {"kind": calls, "b": SCHEMA}


def test_schemas_longer_than_all_may_be_are_not_looked_at() -> None:
    """A process that serves many would be busy with them."""
    tools = [_tool(f"f{number}") for number in range(2000)]
    for each in tools:
        each["function"]["parameters"] = {**SCHEMA, "description": "x" * 1000}
    use = tool_use(tools, "auto", None, "hermes", strict_by_default=True)
    assert use is not None
    kept = [number for number in range(2000) if f"f{number}" in use.strict]
    assert kept == list(range(len(kept)))
    assert 100 < len(kept) < MAX_SOURCE // 1000


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"mode": "auto"}, "give mode"), ({"tools": NAMES}, "give mode"),
        ({"mode": "never", "tools": NAMES}, "give mode"),
        ({"mode": "auto", "tools": []}, "give mode"),
        ({"allowed_tools": 3}, "give mode"), ({"mode": "auto", "tools": ["b"]}, "type 'function'"),
        ({"mode": "auto", "tools": [{"type": "web_search"}]}, "type 'function'"),
        ({"mode": "auto", "tools": [{**NAMES[1], "name": "x"}]}, "no function of this name"),
    ],
)  # fmt: skip
def test_a_choice_that_allows_nothing_is_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message):
        tool_use([_tool("b")], {"type": "allowed_tools", **choice}, None, "hermes")
