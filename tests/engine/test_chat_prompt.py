"""Conversations as the OpenAI API means them, for templates that differ in what they take."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from typing import Any

import pytest
from helpers import byte_level_tokenizer

from reprise.engine import chat_prompt
from reprise.errors import RequestError

STRINGS = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
CONCATENATES = "{% for m in messages %}{{ '[' + m['role'] + '|' + m['content'] + ']' }}{% endfor %}"
ITERATES = (
    "{% for m in messages %}[{{ m.role }}|"
    "{% for part in m.content %}{{ part.text }}{% endfor %}]{% endfor %}"
)
BOTH = (
    "{% for m in messages %}[{{ m.role }}|{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}]{% endfor %}"
)
VANISHES = (  # as Qwen3's does with a list
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "[{{ m.role }}|{{ content }}]{% endfor %}"
)
MACRO = (
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}[{{ m.role }}|{{ show(m.content) }}]{% endfor %}"
)
ALL = [STRINGS, CONCATENATES, ITERATES, BOTH, VANISHES, MACRO]

AS_JSON = (
    "{% for m in messages %}[{{ m.role }}|{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}:"
    "{{ call.function.arguments | tojson }}{% endfor %}]{% endfor %}"
)
AS_TEXT = AS_JSON.replace(" | tojson", "")
AS_IS = AS_JSON.replace(
    "{{ call.function.arguments | tojson }}",
    "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}",
)
NULL_ONLY = (  # as DeepSeek's: tool calls where content is none, concatenated
    "{% for m in messages %}{% if m.content is none %}[{{ m.role }}|"
    "{% for call in m.tool_calls %}{{ call.function.name + ':' + call.function.arguments }}"
    "{% endfor %}]{% else %}{{ '[' + m.role + '|' + m.content + ']' }}{% endif %}{% endfor %}"
)
NINE_LETTERS = (  # as Mistral's: the whole function as JSON, ids of a certain length
    "None: {% for m in messages %}[{{ m.role }}|{% if m.tool_calls is defined %}"
    "{% for call in m.tool_calls %}"
    "{% if call.id|length != 9 %}{{ raise_exception('id') }}{% endif %}"
    "{{ call.function | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}]{% endfor %}"
)
EMPTY_ONLY = AS_JSON.replace("{{ m.content }}", "{{ '' + m.content }}")


@functools.cache
def tokenizer() -> Any:
    return byte_level_tokenizer()


def render(messages: Any, template: str, **options: Any) -> str:
    return chat_prompt(tokenizer(), messages, chat_template=template, **options)["prompt"]


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": each} for each in parts]


@pytest.mark.parametrize("template", ALL)
@pytest.mark.parametrize(
    "content", ["hi", text("hi"), ["hi"], [{"type": "input_text", "text": "hi"}]]
)
def test_text_and_its_parts_are_the_same(template: str, content: Any) -> None:
    messages = [
        {"role": "system", "content": content},
        {"role": "user", "content": content},
        {"role": "assistant", "content": content},
        {"role": "user", "content": content},
    ]
    assert render(messages, template) == "[system|hi][user|hi][assistant|hi][user|hi]"


@pytest.mark.parametrize("template", ALL)
def test_several_parts(template: str) -> None:
    messages = [{"role": "user", "content": text("one", "two")}]
    joined = "[user|one\ntwo]" if template in (STRINGS, CONCATENATES, VANISHES) else "[user|onetwo]"
    assert render(messages, template) == joined
    assert render(messages, template, chat_template_content_format="string") == (
        "[user|]" if template == ITERATES else "[user|one\ntwo]"
    )


def test_a_form_that_is_asked_for() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert render(messages, BOTH, chat_template_content_format="openai") == "[user|hi]"
    template = "{{ messages[0].content is string }}"
    assert render(messages, template) == "True"
    assert render(messages, template, chat_template_content_format="openai") == "False"
    with pytest.raises(RequestError, match="chat_template_content_format='html'"):
        render(messages, BOTH, chat_template_content_format="html")


def call(arguments: Any, **others: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments},
            **others}  # fmt: skip


@pytest.mark.parametrize("arguments", ['{"a": "b", "n": 1}', {"a": "b", "n": 1}])
@pytest.mark.parametrize("template", [AS_JSON, AS_TEXT, AS_IS, NULL_ONLY, EMPTY_ONLY])
@pytest.mark.parametrize("nothing", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_tool_calls(template: str, arguments: Any, nothing: dict[str, Any]) -> None:
    message = {"role": "assistant", **nothing, "tool_calls": [call(arguments)]}
    messages = [{"role": "user", "content": "x"}, message]
    assert render(messages, template) == '[user|x][assistant|add:{"a": "b", "n": 1}]'


def test_tool_calls_of_a_strict_template() -> None:
    calls = {**call('{"a": 1}'), "id": "abcdefghi"}
    messages = [{"role": "assistant", "content": None, "tool_calls": [calls]}]
    shown = '{"name": "add", "arguments": {"a": 1}}'
    assert render(messages, NINE_LETTERS) == f"None: [assistant|{shown}]"
    with pytest.raises(RequestError, match="messages do not fit the chat template: id"):
        render([{"role": "assistant", "tool_calls": [call("{}")]}], NINE_LETTERS)


def test_a_template_that_takes_nothing_but_parts() -> None:
    strict = ITERATES.replace("part.text", "part['text'] + ''")
    messages = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    assert render(messages, strict) == "[user|hi][assistant|hi][user|hi]"


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_no_arguments(arguments: Any) -> None:
    for template in (AS_JSON, AS_TEXT, NULL_ONLY):
        messages = [{"role": "assistant", "tool_calls": [call(arguments)]}]
        assert render(messages, template) == "[assistant|add:{}]"


def test_what_is_null_is_not_there() -> None:
    """As the objects of OpenAI's client come back as dictionaries."""
    template = AS_JSON.replace("{{ m.content }}", "{{ m.content }}{{ m.name }}{{ m.tool_call_id }}")
    null = {"name": None, "tool_calls": None, "refusal": None, "audio": None, "annotations": [],
            "function_call": None, "tool_call_id": None}  # fmt: skip
    assert render([{"role": "assistant", "content": "hi", **null}], template) == "[assistant|hi]"
    assert render([{"role": "assistant", "content": None, **null}], template) == "[assistant|]"
    refusal = {"role": "assistant", "content": None, "refusal": "no"}
    assert render([refusal], template) == "[assistant|no]"


def test_roles() -> None:
    assert render([{"role": "developer", "content": "x"}], STRINGS) == "[system|x]"
    knows = STRINGS + "{% if messages[0].role == 'developer' %}!{% endif %}"
    assert render([{"role": "developer", "content": "x"}], knows) == "[developer|x]!"
    assert render([{"role": "ipython", "content": "x"}], STRINGS) == "[ipython|x]"
    picky = "{% for m in messages if m.role in ('user', 'system') %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        RequestError, match="messages\\[1\\] has role='usr', which the chat template"
    ):
        render([{"role": "user", "content": "x"}, {"role": "usr", "content": "x"}], picky)


def test_thoughts_under_either_name() -> None:
    template = "{% for m in messages %}<{{ m.reasoning_content }}>{{ m.content }}{% endfor %}"
    for name in ("reasoning", "reasoning_content"):
        message = {"role": "assistant", "content": "x", name: "why"}
        assert render([message], template) == "<why>x"
        assert render([message], STRINGS) == "[assistant|x]"


def user(content: Any = "x", **others: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **others}]


def assistant(*calls: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": list(calls)}]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (user([{"type": "image_url", "image_url": {"url": "data:"}}]), "content[0] is of type 'im"),
        (user([*text("a"), {"type": "input_audio"}]), "[1] is of type 'input_audio'"),
        (user([{"type": "file", "file": {}}]), "'file'"),
        (user([{"text": "no type"}]), "of type None"),
        (user([{"type": "text"}]), "content[0].text=None"),
        (user([{"type": "text", "text": "a", "cache_control": {}}]), "'cache_control'"),
        (user([3]), "messages[0].content[0]=3"),
        (user(3), "messages[0].content=3"),
        (user(None), "messages[0] has no content"),
        ([{"role": "user"}], "messages[0] has no content"),
        (user(contnet="x"), "messages[0] has the unknown key 'contnet'"),
        (user(audio={"id": "1"}), "'audio'"),
        (user(function_call={"name": "x"}), "give tool_calls"),
        ([{"content": "x"}], "messages[0] has role=None"),
        ([*user(), {"role": 3, "content": "x"}], "messages[1] has role=3"),
        (["x"], "messages[0]='x'"),
        ([], "messages is empty"),
        ({"role": "user", "content": "x"}, "give a list of messages"),
        (assistant(call("{")), "messages[0].tool_calls[0].function.arguments='{'"),
        (assistant(call("[1]")), "give a JSON object"),
        (assistant(call(3)), "arguments=3"),
        (assistant(call({}, kind="x")), "messages[0].tool_calls[0] has the unknown key 'kind'"),
        (assistant({"type": "custom", "function": {}}), "type='custom'"),
        (assistant({"type": "function"}), "function=None"),
        (assistant({"function": {"name": "a", "args": {}}}), "function has the unknown key 'args'"),
        (assistant({"function": {"arguments": {}}}), "name=None"),
        ([{"role": "assistant", "tool_calls": {"0": 1}}], "tool_calls={'0': 1}"),
    ],
)  # fmt: skip
def test_refused(messages: Any, named: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(messages, AS_JSON)
    assert named in str(caught.value)


def test_what_a_template_reads_is_no_unknown_key() -> None:
    template = "{% for m in messages %}{{ m.content }}{{ m['weight'] }}{% endfor %}"
    assert render(user(weight=3), template) == "x3"


def test_tool_calls_that_would_vanish() -> None:
    messages = [{"role": "assistant", "content": "x", "tool_calls": [call({})]}]
    with pytest.raises(RequestError, match="does not show tool calls"):
        render(messages, STRINGS)
    with pytest.raises(RequestError, match="tool calls without content alone"):
        render(messages, NULL_ONLY)


TOOL = {"type": "function", "function": {
    "name": "add", "description": "adds", "parameters": {"type": "object", "anything": {}},
    "strict": True,
}}  # fmt: skip
WITH_TOOLS = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ messages[0].content }}"


@pytest.mark.parametrize("role", ["User", "ASSISTANT", " system", "Developer"])
def test_a_role_that_is_spelled_otherwise(role: str) -> None:
    """A template that prints any role would make a name of it that no model knows."""
    with pytest.raises(RequestError, match=f"give '{role.strip().lower()}'"):
        render([{"role": role, "content": "x"}], "{{ messages[0].role }}")


def test_tools() -> None:
    for tools in ([TOOL], (TOOL,)):
        assert '"anything"' in render(user(), WITH_TOOLS, tools=tools)
    for nothing in (None, []):
        assert render(user(), WITH_TOOLS.replace("tools", "(tools or [])"), tools=nothing) == "x"
    bare = {"type": "function", "function": {"name": "add"}}
    null = {**bare, "function": {"name": "add", "strict": None, "description": None}}
    whole = "{{ tools | tojson }}" + WITH_TOOLS
    assert render(user(), whole, tools=[null]) == render(user(), whole, tools=[bare])
    for tools, named in (
        (TOOL, "give a list"),
        ([{**TOOL, "typ": 1}], "tools[0] has the unknown key 'typ'"),
        (
            [{"function": {**TOOL["function"], "params": {}}}],
            "tools[0].function has the unknown key 'p",
        ),  # type: ignore[dict-item]
        ([{"type": "web_search", "function": {}}], "type='web_search'"),
        ([{"name": "add"}], "unknown key 'name'"),
        ([len], "tools[0]="),
    ):
        with pytest.raises(RequestError) as caught:
            render(user(), WITH_TOOLS, tools=tools)
        assert named in str(caught.value)


def test_what_no_variable_reads_is_refused() -> None:
    for options in (
        {"tools": [TOOL]},
        {"documents": [{"title": "a"}]},
        {"chat_template_kwargs": {"tools": [TOOL]}},
    ):
        name = next(iter(options.get("chat_template_kwargs", options)))  # type: ignore[attr-defined]
        with pytest.raises(RequestError, match=f"does not read '{name}'"):
            render(user(), STRINGS, **options)
    for name in ("tokenize", "messages", "raise_exception"):
        with pytest.raises(RequestError, match=f"'{name}', which is set here"):
            render(user(), STRINGS, chat_template_kwargs={name: 1})
    with pytest.raises(RequestError, match="the key 1: give strings"):
        render(user(), STRINGS, chat_template_kwargs={1: 1})
    for options, named in (
        ({"documents": {"title": "a"}}, "documents="),
        ({"documents": ["a"]}, "documents\\[0\\]='a'"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs="),
        ({"chat_template": 3}, "chat_template=3"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt='yes'"),
    ):
        with pytest.raises(RequestError, match=named):
            chat_prompt(tokenizer(), user(), **options)  # type: ignore[arg-type]


def test_variables_of_other_models_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM's users give enable_thinking=False to every model; a mistyped name is seen in the log,
    once."""
    template = STRINGS + "{{ mood }}"
    plain = render(user(), template, chat_template_kwargs={"mood": "glad"})
    variables = {"mood": "glad", "enable_thinking": False, "moood": "sad"}
    with caplog.at_level(logging.INFO, "reprise"):
        found = [render(user(), template, chat_template_kwargs=variables) for _ in range(3)]
    assert found == [plain] * 3
    (message,) = [each.getMessage() for each in caplog.records]
    assert "does not read 'enable_thinking', 'moood'" in message
    assert "its variables: mood" in message


def test_documents_and_variables() -> None:
    template = (
        "{% for d in documents %}{{ d.title }}{% endfor %}{{ mood }}{{ messages[0].content }}"
    )
    options = {"documents": [{"title": "a", "any": 1}], "chat_template_kwargs": {"mood": "glad"}}
    assert render(user(), template, **options) == "agladx"


@pytest.mark.parametrize("template", ["template.jinja", "rag", "{{ bos_token }}", "{{ message }}"])
def test_a_template_that_reads_no_messages_is_refused(template: str) -> None:
    """A file's name, or the name of one of several templates where there is one: its letters would
    be the prompt of every conversation."""
    with pytest.raises(RequestError, match=r"the chat template '.*' does not read 'messages'"):
        chat_prompt(tokenizer(), user(), chat_template=template)


def test_going_on_with_the_last_message() -> None:
    messages = [*user("2 + 2 ="), {"role": "assistant", "content": "The answer"}]
    prompt = chat_prompt(
        tokenizer(), messages, add_generation_prompt=False, continue_final_message=True
    )["prompt"]
    assert prompt.endswith("assistant: The answer")
    with pytest.raises(RequestError, match="give add_generation_prompt=False"):
        chat_prompt(tokenizer(), messages, continue_final_message=True)


def test_templates_by_name() -> None:
    several = byte_level_tokenizer()
    several.chat_template = {"default": STRINGS, "tool_use": WITH_TOOLS}
    assert chat_prompt(several, user())["prompt"] == "[user|x]"
    assert "adds" in chat_prompt(several, user(), tools=[TOOL])["prompt"]
    assert chat_prompt(several, user(), chat_template="default")["prompt"] == "[user|x]"
    several.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        chat_prompt(several, user())
    loop_controls = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    loop_controls += "{% break %}{% endfor %}"
    assert chat_prompt(several, user(), chat_template=loop_controls)["prompt"] == "x"


def test_what_is_known_of_templates_keeps_no_tokenizer() -> None:
    one = byte_level_tokenizer()
    for number in range(40):
        chat_prompt(one, user(), chat_template=f"{number} {{{{ messages[0].content }}}}")
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
