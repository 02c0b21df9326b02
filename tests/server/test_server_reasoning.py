"""Thoughts and answers: one parser for streamed and plain output, whatever the pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from http_server import Server
from hypothesis import given
from hypothesis import strategies as st

from reprise.server.chat import Chat
from reprise.server.fields import ChatRequest
from reprise.server.options import ServerOptions
from reprise.server.reasoning import Splitter, ThoughtTokens, thinks_from_start

PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "<th", "ink>", "</", " ", "\n", "a", "so x<y"])
)


def split(pieces: list[str], thinking: bool) -> dict[str, str]:
    splitter, found = Splitter(thinking), {"content": "", "reasoning": ""}
    for piece in pieces:
        parts = splitter.feed(piece)
        assert all(text for _, text in parts)
        for kind, text in parts:
            found[kind] += text
    for kind, text in splitter.finish():
        found[kind] += text
    return found


@given(PIECES, st.booleans(), st.data())
def test_how_a_text_is_cut_makes_no_difference(
    pieces: list[str], thinking: bool, data: st.DataObject
) -> None:
    text = "".join(pieces)
    whole = split([text], thinking)
    assert split(pieces, thinking) == whole
    assert split(list(text), thinking) == whole
    # Nothing is lost but tags and the white space beside them.
    kept = whole["reasoning"] + whole["content"]
    bare = text.replace("<think>", "", 1).replace("</think>", "", 1)
    assert sorted("".join(kept.split())) in (
        sorted("".join(bare.split())), sorted("".join(text.split())),
        sorted("".join(text.replace("</think>", "", 1).split())),
        sorted("".join(text.replace("<think>", "", 1).split())),
    )  # fmt: skip


@given(PIECES, st.booleans(), st.data())
def test_how_tokens_come_makes_no_difference_to_which_are_thoughts(
    tokens: list[str], thinking: bool, data: st.DataObject
) -> None:
    """Texts come behind their tokens where they are held back. A token is a thought if it begins
    before the end of the thought."""
    tokens = [*tokens, ""]  # one that ends the text, and has none
    text = "".join(tokens)
    splitter = Splitter(thinking)
    splitter.feed(text)
    begins = [len("".join(tokens[:place]).encode()) for place in range(len(tokens))]
    if splitter.thought_end is not None:
        expected = sum(begin < splitter.thought_end for begin in begins)
    else:
        expected = len(tokens) if splitter.thinking else 0

    late = data.draw(st.integers(0, 3))
    splitter = Splitter(thinking)
    count = ThoughtTokens(splitter)
    known = said = 0
    while known < len(tokens):
        more = data.draw(st.integers(1, 4))
        new, known = tokens[known : known + more], min(known + more, len(tokens))
        until = len(tokens) if known == len(tokens) else max(said, known - late)
        splitter.feed("".join(tokens[said:until]))
        said = until
        count.add([len(each.encode()) for each in new])
    assert count.count == expected


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("<think>\nA\n\nb\n</think>\n\nHi.\n", False, "A\n\nb", "Hi.\n"),
        ("A\n</think>\n\nHi.", True, "A", "Hi."),
        ("<think>\nA</think>Hi.", True, "A", "Hi."),
        ("\n\nHi.", False, "", "\n\nHi."),
        ("What does <think> mean?", False, "", "What does <think> mean?"),
        ("no end", True, "no end", ""),
        ("", True, "", ""),
        ("x </thin", True, "x </thin", ""),
        ("A</think>B</think>C", True, "A", "B</think>C"),
    ],
)
def test_what_is_what(text: str, thinking: bool, reasoning: str, content: str) -> None:
    assert split([text], thinking) == {"reasoning": reasoning, "content": content}


@pytest.mark.parametrize(
    ("parser", "tail", "unfinished", "thinks"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", None, True),
        ("qwen3", "<|im_start|>assistant\n", None, False),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", None, False),
        ("deepseek_r1", "<|Assistant|>", None, True),
        ("deepseek_r1", "<|Assistant|></think>", None, False),
        ("qwen3", "assistant\n<think>\nSo far", "<think>\nSo far", True),
        ("qwen3", "x</think>\nHi", "<think>\nx</think>\nHi", False),
    ],
)
def test_where_an_output_begins(
    parser: str, tail: str, unfinished: str | None, thinks: bool
) -> None:
    assert thinks_from_start(parser, tail, unfinished) is thinks


@pytest.mark.parametrize(
    ("parser", "unfinished", "where"),
    [
        ("none", None, {}),
        ("qwen3", None, {"begin_after": 8, "opened_by": 7}),
        ("qwen3", "So", {"begin_after": 8, "opened_by": 7}),
        ("qwen3", "<think>\nSo far", {"begin_after": 8, "opened_by": None}),
        ("qwen3", "<think>\nx</think>\nHi", {}),
        ("deepseek_r1", None, {"begin_after": 8, "opened_by": None}),
        ("deepseek_r1", "x</think>\nHi", {}),
    ],
)
def test_where_what_has_to_match_begins(
    parser: str, unfinished: str | None, where: dict[str, int | None]
) -> None:
    """A model that does not think would never come to the end of a thought: its answer has to match
    from the first token on. As far as the prompt does not say it, the engine looks."""
    goes_on = unfinished is not None
    given = [{"role": "user", "content": "x"}]
    given += [{"role": "assistant", "content": unfinished}] if goes_on else []
    request = ChatRequest.model_validate(
        {"messages": given, "response_format": {"type": "json_object"},
         "continue_final_message": goes_on}
    )  # fmt: skip
    facts = {"think_ids": [7, 8], "max_model_len": 99, "max_logprobs": 20, "message_names": []}
    chat = Chat(request, "n", "m", "f", parser, "none", facts, {}, ServerOptions())
    assert chat.asks[0]["params"]["structured_outputs"] == {"json_object": True, **where}


THOUGHT = ["<th", "ink>\n", "So", ": 1+1", "\n</thi", "nk>\n\n", "It is ", "2."]


def body(pieces: list[str], **options: Any) -> dict[str, Any]:
    content = json.dumps({"pieces": pieces})
    return {"messages": [{"role": "user", "content": content}], **options}


@pytest.mark.parametrize(
    ("pieces", "options", "reasoning", "content"),
    [
        (THOUGHT, {}, "So: 1+1", "It is 2."),
        (THOUGHT[2:], {"chat_template_kwargs": {"enable_thinking": True}}, "So: 1+1", "It is 2."),
        (["It is ", "2."], {"reasoning_effort": "none"}, None, "It is 2."),
        (THOUGHT[:3], {}, "So", None),
        (THOUGHT, {"include_reasoning": False}, None, "It is 2."),
    ],
)
def test_streamed_and_plain_say_the_same(
    stub: Server, pieces: list[str], options: dict[str, Any], reasoning: Any, content: Any
) -> None:
    with stub.client() as client:
        message = client.post("/v1/chat/completions", json=body(pieces, **options)).json()
        text = client.post("/v1/chat/completions", json=body(pieces, stream=True, **options)).text
    message = message["choices"][0]["message"]
    assert message["content"] == content
    assert message.get("reasoning") == message.get("reasoning_content") == reasoning
    found = {"reasoning": "", "reasoning_content": "", "content": ""}
    for line in text.split("\n\n")[:-2]:
        for key, value in json.loads(line.removeprefix("data: "))["choices"][0]["delta"].items():
            if key != "role":
                found[key] += value
    assert found["content"] == (content or "")
    assert found["reasoning"] == found["reasoning_content"] == (reasoning or "")
