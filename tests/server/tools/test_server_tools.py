"""Structured output and tool calls through the official client, streamed and plain."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from http_server import Server
from pydantic import BaseModel, Field

pytest.importorskip("xgrammar")
jsonschema = pytest.importorskip("jsonschema")

TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{{ "<tool_call>" if tools else "" }}
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ASK = [{"role": "user", "content": "What is the weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1,
                   "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome",  "days": 2}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def with_tools(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    file = tmp_path_factory.mktemp("template") / "tools.jinja"
    yield from _client(device, file, ["--max-num-seqs", "8"])


def _client(device: str, file: Path, options: list[str]) -> Iterator[openai.OpenAI]:
    file.write_text(TEMPLATE)
    server = Server(
        ["-m", "reprise", "serve", "--port", "0", "--device", device, "--num-blocks", "400",
         "--chat-template", str(file), *options]
    )  # fmt: skip
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.close()


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"max_tokens": 400, "temperature": 0, "messages": ASK, **options}
    return client.chat.completions.create(model="demo", **options)


def both(client: openai.OpenAI, **options: Any) -> tuple[Any, Any]:
    """A plain reply, and one that is put together from a stream: content, calls, finish reason."""
    plain = chat(client, **options).choices[0]
    calls = [
        (each.function.name, each.function.arguments) for each in plain.message.tool_calls or []
    ]
    content, streamed, ids, finish = "", [], set(), None
    for chunk in chat(client, stream=True, **options):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for each in choice.delta.tool_calls or []:
            if each.id is not None:
                assert each.index == len(streamed)
                ids.add(each.id)
                streamed.append([each.function.name, ""])
            streamed[each.index][1] += each.function.arguments
    assert len(ids) == len(streamed)
    assert (plain.message.content or "", plain.finish_reason) == (content, finish)
    assert calls == [tuple(each) for each in streamed]
    return plain, calls


# ---- structured output ---------------------------------------------------------------------


def test_response_formats(with_tools: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    plain, _ = both(with_tools, response_format=form, temperature=1, seed=1)
    jsonschema.validate(json.loads(plain.message.content), SCHEMA)
    assert plain.finish_reason == "stop"
    plain, _ = both(with_tools, response_format={"type": "text"}, max_tokens=4)
    assert plain.finish_reason == "length"
    plain, _ = both(with_tools, response_format={"type": "json_object"}, max_tokens=20)
    assert plain.message.content.startswith("{")
    tag = {"begin": "<n>", "schema": {"type": "integer", "minimum": 0, "maximum": 9}, "end": "</n>"}
    legacy = {"type": "structural_tag", "structures": [tag], "triggers": ["<n>"]}
    assert both(with_tools, response_format=legacy, max_tokens=8)


@pytest.mark.parametrize(
    ("what", "pattern"),
    [({"regex": "[ab]{3}"}, "[ab]{3}"), ({"choice": ["yes", "no"]}, "yes|no"),
     ({"grammar": 'root ::= "x" | "y"'}, "x|y"), ({"json": SCHEMA}, r"\{.*\}")],
)  # fmt: skip
def test_structured_outputs_by_vllm_s_name(
    with_tools: openai.OpenAI, what: dict[str, Any], pattern: str
) -> None:
    extra = {"structured_outputs": what}
    plain, _ = both(with_tools, extra_body=extra)
    assert re.fullmatch(pattern, plain.message.content, re.DOTALL)
    text = with_tools.completions.create(
        model="demo", prompt="Once", max_tokens=400, temperature=0, extra_body=extra
    )
    assert re.fullmatch(pattern, text.choices[0].text, re.DOTALL)


class Weather(BaseModel):
    city: str = Field(max_length=12)
    days: int = Field(ge=0, le=99)


def test_the_client_parses_a_model_of_pydantic(with_tools: openai.OpenAI) -> None:
    reply = with_tools.chat.completions.parse(
        model="demo", messages=ASK, response_format=Weather, max_tokens=200, temperature=0
    )
    assert isinstance(reply.choices[0].message.parsed, Weather)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "xml"}}, "its type is one of"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "array", "uniqueItems": True}}}}, "uniqueItems"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["a"]}}}, "give one of"),
        ({"extra_body": {"structured_outputs": {"regex": "(?=a)"}}}, "looking ahead"),
        ({"extra_body": {"guided_json": SCHEMA}}, "give structured_outputs"),
        ({"response_format": {"type": "json_object"},
          "extra_body": {"structured_outputs": {"regex": "a"}}}, "exclude each other"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
         "exclude each other"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "give none, auto, required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "no function of this name"),
        ({"tools": [{"type": "function"}]}, "a function with a name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "two functions"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "type": "object", "minContains": 1}}}], "tool_choice": "required"}, "minContains"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
            "type": "object", "minContains": 1}}}]}, "minContains"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_bad_request(
    with_tools: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message):
            chat(with_tools, stream=stream, **options)


# ---- tools ---------------------------------------------------------------------------------


def test_calls_are_read_from_what_the_model_writes(with_tools: openai.OpenAI) -> None:
    text = f"I look it up.\n{CALL}\n{CALL}"
    extra = {"structured_outputs": {"choice": [text]}}
    plain, calls = both(with_tools, tools=TOOLS, extra_body=extra)
    assert calls == [("get_weather", '{"city": "Rome",  "days": 2}')] * 2
    assert plain.message.content == "I look it up."
    assert plain.finish_reason == "tool_calls"
    plain, calls = both(with_tools, tools=TOOLS, extra_body=extra, parallel_tool_calls=False)
    assert len(calls) == 1
    plain, calls = both(with_tools, tools=TOOLS, extra_body=extra, max_tokens=24)
    assert plain.finish_reason == "length"
    plain, calls = both(with_tools, tools=TOOLS, extra_body=extra, tool_choice="none")
    assert (calls, plain.message.content, plain.finish_reason) == ([], text, "stop")
    plain, calls = both(with_tools, tools=TOOLS, max_tokens=8)
    assert (calls, plain.finish_reason) == ([], "length")


def test_the_template_is_shown_the_tools_whatever_is_chosen(with_tools: openai.OpenAI) -> None:
    def prompt(**options: Any) -> int:
        return int(chat(with_tools, max_tokens=1, **options).usage.prompt_tokens)

    choices = ("auto", "none", "required")
    assert len({prompt(tools=TOOLS, tool_choice=each) for each in choices}) == 1
    assert prompt(tools=TOOLS) > prompt()


def test_required_and_named_calls_are_made(with_tools: openai.OpenAI) -> None:
    check_choices(with_tools)
    now = {"type": "function", "function": {"name": "now"}}
    allowed = {"mode": "required", "tools": [now]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    _, calls = both(with_tools, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("now", {})]


def test_a_strict_tool_leaves_the_model_its_choice(with_tools: openai.OpenAI) -> None:
    """Its text is its own; beside a format, the format is what counts."""
    strict = [{"type": "function", "function": {**each["function"], "strict": True}}  # type: ignore[dict-item]
              for each in TOOLS]  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    plain, calls = both(with_tools, tools=strict, response_format=form)
    assert not calls
    jsonschema.validate(json.loads(plain.message.content), SCHEMA)
    plain, calls = both(with_tools, tools=strict, max_tokens=12)
    assert (calls, plain.finish_reason) == ([], "length")
    assert plain.message.content


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3_coder", "llama3_json", "deepseek_v31", "deepseek_v4"])
def test_calls_of_other_families_are_made(device: str, family: str, tmp_path: Path) -> None:
    clients = _client(device, tmp_path / "tools.jinja", ["--tool-call-parser", family])
    check_choices(next(clients))
    next(clients, None)


def check_choices(client: openai.OpenAI) -> None:
    for seed in range(2):
        plain, calls = both(
            client, tools=TOOLS, tool_choice="required", temperature=1, seed=seed,
            parallel_tool_calls=False,
        )  # fmt: skip
        ((name, arguments),) = calls
        assert plain.finish_reason == "tool_calls"
        assert plain.message.content is None
        if name == "get_weather":
            jsonschema.validate(json.loads(arguments), SCHEMA)
        else:
            assert json.loads(arguments) == {}
    named = {"type": "function", "function": {"name": "get_weather"}}
    plain, ((name, arguments),) = both(client, tools=TOOLS, tool_choice=named)
    assert (name, plain.finish_reason) == ("get_weather", "stop")
    jsonschema.validate(json.loads(arguments), SCHEMA)


def test_a_conversation_goes_on_with_the_answer_of_a_tool(with_tools: openai.OpenAI) -> None:
    once = {"tool_choice": "required", "parallel_tool_calls": False}
    reply = chat(with_tools, tools=TOOLS, **once).choices[0].message
    answers = [
        {"role": "tool", "tool_call_id": each.id, "content": "sunny"} for each in reply.tool_calls
    ]
    messages = [*ASK, reply.model_dump(exclude_none=True), *answers]
    assert chat(with_tools, messages=messages, tools=TOOLS, max_tokens=4).choices


def test_a_model_whose_calls_are_not_known_is_told_so(server: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="--tool-call-parser"),
    ):
        chat(client, tools=TOOLS)
