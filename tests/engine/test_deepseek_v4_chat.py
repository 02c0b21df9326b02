"""DeepSeek-V4's conversations: the grammar of its releases, with the checkpoint's own texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import byte_level_tokenizer

from reprise.engine import chat_prompt
from reprise.engine.deepseek_v4_chat import DeepSeekV4Chat
from reprise.errors import RequestError
from reprise.loading.chat_encoder import FILE, EncoderTexts, encoder_texts
from reprise.loading.tokenizer import load_tokenizer

BOS, EOS, USER, BOT = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
PREVIEW = '''
import os
dsml_token: str = "x"
REASONING_EFFORT_MAX = (
    "Think "
    "hard.\\n\\n"
)
response_format_template: str = ("Reply in {schema}")
TOOLS_TEMPLATE = """Call <{dsml_token}tool_calls>, after {thinking_end_token}:
{tool_schemas}
{{so}}.
"""
os.abort()  # nothing of this runs
def render(x): return TOOLS_TEMPLATE.format(tool_schemas=x)
'''
LATER = PREVIEW.replace("REASONING_EFFORT_MAX", "_UNUSED") + (
    "REASONING_EFFORT_PROMPTS: dict = "
    '{"low": "", "high": "Think hard.\\n\\n", "max": "Harder.\\n"}\n'
    'DEFAULT_REASONING_EFFORT = "low"\n'
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"title": "é"}}}
CALLS = "\n\n<｜DSML｜tool_calls>\n{}\n</｜DSML｜tool_calls>"


def texts_of(folder: Path, source: str | bytes) -> EncoderTexts:
    (folder / FILE).parent.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(source if isinstance(source, bytes) else source.encode())
    found = encoder_texts(folder)
    assert found is not None
    return found


@pytest.fixture
def preview(tmp_path: Path) -> EncoderTexts:
    return texts_of(tmp_path, PREVIEW)


def rendered(texts: EncoderTexts, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    tokenizer = byte_level_tokenizer()
    tokenizer.encoder_texts = texts
    found = chat_prompt(tokenizer, messages, **options)
    prompt = found["prompt"]
    assert isinstance(prompt, str)
    assert found["prompt_token_ids"] == tokenizer.encode(prompt, add_special_tokens=False)
    return prompt


def said(*texts: str) -> list[dict[str, Any]]:
    """User and assistant by turns."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def call(arguments: Any, name: str = "f", number: str = "1") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("options", "opened"),
    [
        ({}, "<think>"),
        ({"enable_thinking": True}, "<think>"),
        ({"thinking": False}, "</think>"),
        ({"reasoning_effort": "none"}, "</think>"),
    ],
)
def test_turns_follow_each_other_without_anything_between(
    preview: EncoderTexts, options: dict[str, Any], opened: str
) -> None:
    """Answers before the last turn have lost what was thought; their marker says so."""
    messages = [{"role": "system", "content": "S"}, *said("a", "b", "c")]
    messages[2]["reasoning_content"] = "thought"
    expected = f"{BOS}S{USER}a{BOT}</think>b{EOS}{USER}c{BOT}{opened}"
    assert rendered(preview, messages, chat_template_kwargs=options) == expected


def test_thoughts_are_kept_behind_the_last_user_and_where_there_are_tools(
    preview: EncoderTexts,
) -> None:
    messages = said("a", "b", "c", "d")
    messages[1]["reasoning"], messages[3]["reasoning_content"] = "one", "two"
    done = {"add_generation_prompt": False}
    tail = f"{USER}c{BOT}<think>two</think>d{EOS}"
    assert rendered(preview, messages, **done) == f"{BOS}{USER}a{BOT}</think>b{EOS}{tail}"
    kept = f"{USER}a{BOT}<think>one</think>b{EOS}{tail}"
    keep = {"drop_thinking": False}
    assert rendered(preview, messages, chat_template_kwargs=keep, **done) == BOS + kept
    schema = '{"name": "f", "parameters": {"title": "é"}}'
    head = f"\n\nCall <｜DSML｜tool_calls>, after </think>:\n{schema}\n{{so}}.\n"
    assert rendered(preview, messages, tools=[TOOL], **done) == BOS + head + kept
    system = [{"role": "system", "content": "S"}, *messages]
    assert rendered(preview, system, tools=[TOOL], **done) == f"{BOS}S{head}{kept}"


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ({"k": "v", "n": [1, {"é": None}]},
         '<｜DSML｜parameter name="k" string="true">v</｜DSML｜parameter>\n'
         '<｜DSML｜parameter name="n" string="false">[1, {"é": null}]</｜DSML｜parameter>'),
        ('{"k": 1}', '<｜DSML｜parameter name="k" string="false">1</｜DSML｜parameter>'),
        ("{k", '<｜DSML｜parameter name="arguments" string="true">{k</｜DSML｜parameter>'),
        ("[1]", '<｜DSML｜parameter name="arguments" string="true">[1]</｜DSML｜parameter>'),
        (None, ""),
        ("", ""),
    ],
)  # fmt: skip
def test_calls_in_every_form_that_clients_send(
    preview: EncoderTexts, arguments: Any, lines: str
) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    found = rendered(preview, [*said("a"), turn], add_generation_prompt=False)
    block = CALLS.format(f'<｜DSML｜invoke name="f">\n{lines}\n</｜DSML｜invoke>')
    assert found == f"{BOS}{USER}a{BOT}<think></think>{block}{EOS}"


def test_results_are_one_turn_in_the_order_of_their_calls(preview: EncoderTexts) -> None:
    calls = [call({}, "f", "1"), call({}, "g", "2")]
    messages = [
        *said("a"),
        {"role": "assistant", "content": "b", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": "second"},
        {"role": "tool", "tool_call_id": "1",
         "content": [{"type": "text", "text": "fi"}, {"type": "text", "text": "rst"}]},
        *said("c"),
    ]  # fmt: skip
    off = {"thinking": False}
    found = rendered(preview, messages, chat_template_kwargs=off)
    assert found.endswith(
        f"{EOS}{USER}<tool_result>fi\n\nrst</tool_result>\n\n<tool_result>second</tool_result>"
        f"\n\nc{BOT}</think>"
    )


def test_what_only_this_model_knows(preview: EncoderTexts) -> None:
    """Reminders, developers, forms of answers, tasks."""
    ask = {"role": "user", "content": "a"}
    reminder = {"role": "latest_reminder", "content": "R"}
    assert rendered(preview, [reminder, ask]) == (f"{BOS}<｜latest_reminder｜>R{USER}a{BOT}<think>")
    developer = {"role": "developer", "content": "D", "response_format": {"type": "object"}}
    told = f'{USER}D\n\nReply in {{"type": "object"}}'
    assert rendered(preview, [developer]) == f"{BOS}{told}{BOT}<think>"
    assert rendered(preview, [developer, ask]) == f"{BOS}{USER}a{BOT}<think>"
    off = {"thinking": False}
    assert rendered(preview, [developer, ask], chat_template_kwargs=off) == (
        f"{BOS}{told}{USER}a{BOT}</think>"
    )
    assert rendered(preview, [ask | {"task": "title"}]) == f"{BOS}{USER}a<｜title｜>"
    assert rendered(preview, [ask | {"task": "action"}]) == f"{BOS}{USER}a{BOT}<think><｜action｜>"


def test_an_answer_goes_on(preview: EncoderTexts) -> None:
    more = {"continue_final_message": True, "add_generation_prompt": False}
    found = rendered(preview, said("a", "b"), **more)
    assert found == f"{BOS}{USER}a{BOT}<think></think>b"


@pytest.mark.parametrize(
    ("source", "prefixes"),
    [
        (PREVIEW, ["", "", "", "", "", "Think hard.\n\n", "Think hard.\n\n"]),
        (LATER, ["", "", "", "Think hard.\n\n", "Think hard.\n\n", "Harder.\n", "Harder.\n"]),
    ],
)
def test_an_effort_is_the_next_one_that_the_checkpoint_has(
    tmp_path: Path, source: str, prefixes: list[str]
) -> None:
    """The highest text of the first releases is not the highest one of later ones."""
    texts = texts_of(tmp_path, source)
    asked = [None, "minimal", "low", "medium", "high", "xhigh", "max"]
    for effort, prefix in zip(asked, prefixes, strict=True):
        options: dict[str, Any] = {"reasoning_effort": effort}
        tail = f"S{USER}a{BOT}"
        messages = [{"role": "system", "content": "S"}, *said("a")]
        found = rendered(texts, messages, chat_template_kwargs=options)
        assert found == f"{BOS}{prefix}{tail}<think>", effort
        options["thinking"] = False
        found = rendered(texts, messages, chat_template_kwargs=options)
        assert found == f"{BOS}{tail}</think>"


def test_without_its_file_a_checkpoint_speaks_and_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v4"}')
    texts = encoder_texts(tmp_path)
    assert texts == EncoderTexts()
    assert rendered(texts, said("a")) == f"{BOS}{USER}a{BOT}<think>"
    for options, named in (
        ({"tools": [TOOL]}, "tools need a text"),
        ({"chat_template_kwargs": {"reasoning_effort": "max"}}, "reasoning_effort='max' needs"),
    ):
        with pytest.raises(RequestError, match=named):
            rendered(texts, said("a"), **options)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert encoder_texts(tmp_path) is None


@pytest.mark.parametrize(
    ("messages", "kwargs", "named"),
    [
        (said("a"), {"reasoning_effort": "much"}, "reasoning_effort='much'"),
        (said("a"), {"thinking": "yes"}, "thinking='yes'"),
        (said("a"), {"thinking": True, "enable_thinking": False}, "contradict"),
        ([{"role": "user", "content": "a", "task": "sing"}], {}, "task='sing'"),
        ([{"role": "user", "content": "a", "tools": [TOOL]}], {}, "has tools"),
        ([{"role": "system", "content": "a", "tools": [{}]}], {}, r"tools\[0\]"),
        ([{"role": "critic", "content": "a"}], {}, "role='critic'"),
        ([*said("a"), {"role": "assistant", "reasoning_content": 3}], {}, "reasoning_content=3"),
    ],
)
def test_what_it_was_not_trained_on_is_refused_by_name(
    preview: EncoderTexts, messages: Any, kwargs: dict[str, Any], named: str
) -> None:
    with pytest.raises(RequestError, match=named):
        rendered(preview, messages, chat_template_kwargs=kwargs)


HOSTILE = {
    "looks into objects": (PREVIEW.replace("{schema}", "{schema.__class__}"), "is not known"),
    "asks for a width": (PREVIEW.replace("{schema}", "{schema:>99999999999}"), "is not known"),
    "converts": (PREVIEW.replace("{tool_schemas}", "{tool_schemas!r}"), "is not known"),
    "shows no tools": (PREVIEW.replace("{tool_schemas}", ""), "tool_schemas"),
    "open brace": (PREVIEW.replace("{schema}", "{schema"), "response_format_template"),
    "computes": (PREVIEW + "\nREASONING_EFFORT_PROMPTS = {'low': open('x').read()}", "literal"),
    "a comprehension": (PREVIEW.replace('("Reply in {schema}")', "[x for x in y]"), "literal"),
    "says it twice": (PREVIEW + "\nTOOLS_TEMPLATE = '{tool_schemas}'", "once"),
    "adds to it": (PREVIEW + "\nTOOLS_TEMPLATE += 'x'", "once"),
    "under a condition": (PREVIEW + "\nif x:\n  REASONING_EFFORT_PROMPTS = {}", "once"),
    "in a function": (PREVIEW + "\ndef f():\n global TOOLS_TEMPLATE\n TOOLS_TEMPLATE = 1", "once"),
    "no text": (PREVIEW.replace('("Reply in {schema}")', "3"), "must be a string"),
    "half a character": (PREVIEW.replace("Reply", "\\ud800"), "half a character"),
    "other efforts": (LATER.replace('"low": "", ', ""), "must have"),
    "no such default": (LATER.replace('= "low"', '= "so"'), "DEFAULT_REASONING_EFFORT"),
    "deep brackets": ("x = " + "(" * 100_000, "no Python"),
    "deep signs": ("x = " + "-" * 100_000 + "1", "no Python"),
    "a long sum": ("x = " + "1+" * 100_000 + "1", "no Python"),
    "no Python": ("x = = 1", "no Python"),
    "no text at all": (b"\xff\xfe\x00\x00", "encoding_dsv4.py"),
    "too long": ("#" * (1 << 18) + "\n", "bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_encoder_files_are_refused_and_never_run(tmp_path: Path, name: str) -> None:
    source, named = HOSTILE[name]
    with pytest.raises(ValueError, match=named):
        texts_of(tmp_path, source)


def test_what_a_tool_says_is_no_template(preview: EncoderTexts) -> None:
    tool = {
        "type": "function",
        "function": {"name": "{dsml_token}", "description": "{x.__class__}"},
    }
    assert "{x.__class__}" in rendered(preview, said("a"), tools=[tool])


def test_a_template_of_the_checkpoint_comes_first(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    texts_of(tmp_path, PREVIEW)
    tokenizer = load_tokenizer(tmp_path)
    assert chat_prompt(tokenizer, said("a"))["prompt"] == f"{BOS}{USER}a{BOT}<think>"
    own, theirs = (f"{each} {{{{ messages|length }}}}" for each in ("own", "theirs"))
    assert chat_prompt(tokenizer, said("a"), chat_template=own)["prompt"] == "own 1"
    (tmp_path / "chat_template.jinja").write_text(theirs)
    assert chat_prompt(load_tokenizer(tmp_path), said("a"))["prompt"] == "theirs 1"


def test_servers_know_its_tags() -> None:
    assert "</think>" in DeepSeekV4Chat.text
    assert "<｜DSML｜tool_calls>" in DeepSeekV4Chat.text
