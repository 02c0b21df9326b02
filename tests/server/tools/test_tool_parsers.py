"""Calls are told from text, however the text is cut."""

from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.engine import deepseek_v4_chat
from reprise.server.tools.choice import parser_name
from reprise.server.tools.formats import PARSERS
from reprise.server.tools.parser import MOST_HEADER

TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "detail": {"type": "object"},
            "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "exact": {"type": "boolean"},
            "lines": {"type": "string"},
        },
    },
    "now": {"type": "object", "properties": {}},
}
ARGUMENTS = '{"city": "São \\"Paulo\\" </tool_call> {[", "days": 3, "detail": {"a": [1, {}]}}'
DEEP = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
ONE_DEEP = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
CODER = """<tool_call>
<function=get_weather>
<parameter=city>
</parameter> is
 a <parameter=x> tag
</parameter>
<parameter=days>
3
</parameter>
<parameter=unit>
null
</parameter>
<parameter=exact>True</parameter>
<parameter=lines>

two

</parameter>
</function>
</tool_call>"""

V4 = """<｜DSML｜tool_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true"> a </｜DSML｜parameter> "b"
</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
<｜DSML｜parameter name="detail" string="false">{"a": [1, {}]}</｜DSML｜parameter>
<｜DSML｜parameter name="unit" string="false">no JSON</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="now">
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""

OTHER = '{"x": 1, "name": "now", "parameters": {}}'
HALF = '{"a": ["\\ud83d"]}'
CODED = "<tool_call>\n<function=now>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>"
DSML = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now">\n'
    '<｜DSML｜parameter name="a" string="false">{}</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)

Case = tuple[str, str, str, list[tuple[str, Any]]]
"""Parser, text, content, and calls."""
WEATHER = ("get_weather", json.loads(ARGUMENTS))
NOW: tuple[str, Any] = ("now", {})
HERMES = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
HERMES_NOW = '<tool_call>{"name":"now","arguments":{}}</tool_call>'
LLAMA = f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}'
CASES: list[Case] = [
    ("hermes", "plain text, 3 < 4 <tool", "plain text, 3 < 4 <tool", []),
    ("hermes", HERMES, "", [WEATHER]),
    ("qwen3", f"Let me see.\n\n{HERMES}\n{HERMES_NOW}\n", "Let me see.", [WEATHER, NOW]),
    ("hermes", HERMES_NOW + HERMES, "", [NOW, WEATHER]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', "",
     [("now", {"a": 1})]),
    ("hermes", "<tool_call>no json</tool_call> end", "<tool_call>no json</tool_call> end", []),
    ("hermes", '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    ("hermes", "<tool_call>[1, 2", "<tool_call>[1, 2", []),
    ("hermes", f"{HERMES_NOW} and then", " and then".strip(), [NOW]),
    ("llama3_json", LLAMA, "", [WEATHER]),
    ("llama3_json", f"<|python_tag|>{LLAMA}; {LLAMA}", "", [WEATHER, WEATHER]),
    ("llama3_json", '{"name":"now","arguments":{}} ;{"name": "now", "parameters": {}}', "",
     [NOW, NOW]),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", "It is {not} a call", "It is {not} a call", []),
    ("llama3_json", '{"type": "function", "name": "now", "parameters": {}}', "", [NOW]),
    ("llama3_json", '{"name": 4}', '{"name": 4}', []),
    ("llama3_json", '{"city": "Rome", "name": "now"}', '{"city": "Rome", "name": "now"}', []),
    ("llama3_json", f'{{"name": "now", "parameters": {{}}}}; {OTHER}', f"; {OTHER}", [NOW]),
    ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("qwen3_coder", "text <tool_call> only", "text <tool_call> only", []),
    ("qwen3_coder", f"Well.\n{CODER}\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
     "Well.",
     [("get_weather", {"city": "</parameter> is\n a <parameter=x> tag", "days": 3, "unit": None,
                       "exact": True, "lines": "\ntwo\n"}), NOW]),
    ("deepseek_v31", "Sure." + DEEP.format(
        ONE_DEEP.format("get_weather", ARGUMENTS) + ONE_DEEP.format("now", "{}")),
     "Sure.", [WEATHER, NOW]),
    ("deepseek_v4", f"Well.\n\n{V4}", "Well.",
     [("get_weather", {"city": ' a </｜DSML｜parameter> "b"\n', "days": 3,
                       "detail": {"a": [1, {}]}, "unit": "no JSON"}), NOW]),
    ("deepseek_v4", "a <｜DSML｜tool_calls> b", "a <｜DSML｜tool_calls> b", []),
    ("deepseek_v31", "no <｜tool▁calls▁ here", "no <｜tool▁calls▁ here", []),
    # What Python takes for JSON and nobody else, and what UTF-8 has no characters for.
    ("hermes", f'<tool_call>{{"arguments": {HALF}, "name": "now"}}</tool_call>', "",
     [("now", json.loads(HALF))]),
    ("llama3_json", f'{{"type": "function", "parameters": {HALF}, "name": "n\\ud83d"}}', "",
     [("n\\ud83d", json.loads(HALF))]),
    ("hermes", '<tool_call>{"name": "n\\ud83d", "arguments": {}}</tool_call>', "",
     [("n\\ud83d", {})]),
    *(("qwen3_coder", CODED.format(each), "", [("now", {"a": each})])
      for each in ("NaN", "[-Infinity]", "1e999", "[" * 1000)),
    ("qwen3_coder", CODED.format(HALF), "", [("now", {"a": json.loads(HALF)})]),
    *(("deepseek_v4", DSML.format(each), "", [("now", {"a": each})])
      for each in ("NaN", "[-Infinity]", "1e999", "[" * 1000)),
    ("hermes", '<tool_call>{"arguments": NaN, "name": "now"}</tool_call>',
     '<tool_call>{"arguments": NaN, "name": "now"}</tool_call>', []),
]  # fmt: skip


def read(parser: str, pieces: list[str]) -> tuple[str, list[list[str]], list[Any]]:
    reader = PARSERS[parser](TOOLS)
    events = [event for piece in pieces for event in reader.feed(piece)] + reader.finish()
    orjson.dumps([[*each] for each in events])  # as a server sends them
    content, calls = "", []
    for kind, text in events:
        if kind == "content":
            content += text
        elif kind == "call":
            calls.append([text, ""])
        else:
            calls[-1][1] += text
    return content, calls, events


@pytest.mark.parametrize(("parser", "text", "content", "calls"), CASES)
def test_a_text_is_read(parser: str, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    found, named, _ = read(parser, [text])
    assert found == content
    for _, arguments in named:
        json.loads(arguments, parse_constant=pytest.fail)
    assert [(name, json.loads(arguments)) for name, arguments in named] == calls


@settings(max_examples=150)
@given(st.data())
def test_any_cut_gives_the_same(data: st.DataObject) -> None:
    parser, text, *_ = data.draw(st.sampled_from(CASES))
    more = ["", "\n", " more", text, "<tool_call>", "</tool_call>", "}"]
    text += data.draw(st.sampled_from(more))
    text = text[: data.draw(st.integers(0, len(text)))]  # broken off anywhere
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    whole = read(parser, [text])
    assert read(parser, pieces)[:2] == whole[:2]
    assert read(parser, list(text))[:2] == whole[:2]


WORDS = [
    "<tool_call>", "</tool_call>", "<function=now>", "</function>", "<parameter=a>",
    "</parameter>", '{"name": "now", "arguments": ', '{"arguments": 1, "name": "now"}', "{", "}",
    '"', "\\", ";", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "now", "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>",
    '<｜DSML｜invoke name="now">', "</｜DSML｜invoke>", "</｜DSML｜parameter>",
    '<｜DSML｜parameter name="a" string="true">', '<｜DSML｜parameter name="b" string="false">',
    '{"a": 1, "name": "now"}', '{"type": "function", "name": "now"}',
    " ", "\n", "text", "<|python_tag|>", "[1]", "1", '"\\ud83d"', "NaN",
]  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(sorted(PARSERS)), st.lists(st.sampled_from(WORDS), max_size=14))
def test_any_text_whatever_is_read_the_same_however_it_is_cut(
    parser: str, words: list[str]
) -> None:
    text = "".join(words)
    whole = read(parser, [text])[:2]
    assert read(parser, words)[:2] == whole
    assert read(parser, list(text))[:2] == whole


def test_arguments_are_given_out_as_they_come() -> None:
    for parser, text in (("hermes", HERMES), ("llama3_json", LLAMA)):
        reader = PARSERS[parser](TOOLS)
        seen = ""
        for character in text[: text.index("days")]:
            seen += "".join(
                each.text for each in reader.feed(character) if each.kind == "arguments"
            )
        assert len(seen) > 20
        assert ARGUMENTS.startswith(seen)


@settings(max_examples=40)
@given(st.dictionaries(st.text("abc_", min_size=1), st.one_of(
    st.integers(), st.booleans(), st.none(), st.lists(st.text()), st.text(),
)))  # fmt: skip
def test_what_the_encoder_of_deepseek_v4_writes_is_read_back(arguments: dict[str, Any]) -> None:
    """The oracle is the other direction: earlier calls as a prompt shows them."""
    text = deepseek_v4_chat._calls([{"function": {"name": "f", "arguments": arguments}}] * 2)
    content, calls, _ = read("deepseek_v4", [f"Well.{text}"])
    assert content == "Well."
    assert [(name, json.loads(found)) for name, found in calls] == [("f", arguments)] * 2


def test_the_parser_of_deepseek_v4_is_found_by_its_encoder() -> None:
    assert parser_name(deepseek_v4_chat.DeepSeekV4Chat.text) == "deepseek_v4"


LONG_TEXTS = {
    "hermes": ['<tool_call>{"name": "{}', '<tool_call>{"arguments": {"a": "{}"}, "name": "now"}',
               "<tool_call> {}"],
    "llama3_json": ['{"type": "function", "name": "now", "parameters": {"a": "{}"}}', '{"{}'],
    "qwen3_coder": ["<tool_call>\n<function=now>\n<parameter=a>\n{}"],
    "deepseek_v31": ["<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}"],
    "deepseek_v4": ['<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{}'],
}  # fmt: skip


@pytest.mark.parametrize(("parser", "form"), [(k, v) for k in LONG_TEXTS for v in LONG_TEXTS[k]])
def test_a_piece_takes_no_longer_for_what_came_before(parser: str, form: str) -> None:
    """All streams of a process wait for it."""

    def seconds(size: int) -> float:
        text = form.replace("{}", "lorem " * size)
        began = time.thread_time()
        read(parser, cut(text, 16))
        return time.thread_time() - began

    assert seconds(8000) < 0.05 + 9 * seconds(2000)


def cut(text: str, size: int) -> list[str]:
    return [text[place : place + size] for place in range(0, len(text), size)]


@pytest.mark.parametrize("more", [-40, -1, 0, 1, 40])
@pytest.mark.parametrize(("parser", "form", "ended"), [
    ("hermes", '<tool_call>{"name": "{}", "arguments": {"a": 1}}</tool_call>', True),
    ("llama3_json", '{"name": "{}", "parameters": {"a": 1}}', True),
    ("llama3_json", '{"{}": 1, "name": "now"}', False),
    ("deepseek_v31", DEEP.replace("{}", ONE_DEEP.format("{}", "{}")), False),
    ("deepseek_v4", V4.replace("get_weather", "{}"), False),
])  # fmt: skip
def test_long_names_are_read_the_same_however_they_are_cut(
    parser: str, form: str, ended: bool, more: int
) -> None:
    text = form.replace("{}", "x" * (MOST_HEADER - form.index("{}") + more), 1)
    whole = read(parser, [text])[:2]
    assert read(parser, cut(text, 7))[:2] == read(parser, cut(text, 1000))[:2] == whole
    assert bool(whole[1]) or not ended
