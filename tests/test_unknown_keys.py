"""Whatever mapping a Python user hands in: one key that means nothing there is refused by name."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from helpers import TinyModels, assert_idle, greedy, make_llm, text_model
from hypothesis import assume, given

from reprise import LLM, AsyncLLM
from reprise.errors import RequestError

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{{ m.content }}{% for call in m.tool_calls %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if mood %}{{ mood }}{% endif %}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
)
CALL = {"id": "1", "type": "function", "index": 0, "function": {"name": "add", "arguments": "{}"}}
TOOL = {"type": "function", "function": {
    "name": "add", "description": "adds", "strict": False, "parameters": {"type": "object"},
}}  # fmt: skip

# Every mapping that a call takes, filled with all that belongs there.
PROMPT = {"prompt": "a cat", "prompt_token_ids": [5, 6, 7], "cache_salt": "s"}
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "x"}], "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ],
    "tools": [TOOL, TOOL],
    "chat_template": TEMPLATE,
    "chat_template_kwargs": {"mood": "glad"},
}
FREE = ("parameters", "arguments")
"""Data of the caller's, not options."""

KEYS = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(["multi_modal_data", "prompt_embeds", "image_url", "promt", "Content", "tool",
                     "enable_thinking", "max_tokens", "args", "kind"]),
    st.integers(),
)  # fmt: skip


def mappings(value: Any) -> Iterator[dict[Any, Any]]:
    """All within, the outermost first."""
    if isinstance(value, dict):
        yield value
        for key, each in value.items():
            if key not in FREE:
                yield from mappings(each)
    elif isinstance(value, list):
        for each in value:
            yield from mappings(each)


def is_refused(call: Callable[[], Any], key: Any) -> None:
    with pytest.raises(RequestError) as caught:
        call()
    assert repr(key) in str(caught.value)


@pytest.fixture(scope="module")
def llm(tiny: TinyModels, device: str) -> LLM:
    return make_llm(text_model(tiny, max_position_embeddings=1024), device)


def test_without_one_all_is_accepted(llm: LLM) -> None:
    chat = copy.deepcopy(CHAT)
    llm.chat(chat.pop("messages"), greedy(2), **chat)
    llm.generate(PROMPT, greedy(2))
    empty = {"multi_modal_data": None, "mm_processor_kwargs": {}, "prompt_embeds": None}
    llm.generate({**PROMPT, **empty}, greedy(2))


@given(key=KEYS, value=st.sampled_from([1, "x", {"image": "x"}, [1]]), data=st.data())
def test_prompts(llm: LLM, key: Any, value: Any, data: st.DataObject) -> None:
    assume(key not in PROMPT)
    known = data.draw(st.sampled_from(["prompt", "prompt_token_ids"]))
    prompt = {known: PROMPT[known], key: value}
    is_refused(lambda: llm.generate(prompt, greedy(2)), key)
    is_refused(lambda: llm.generate(["fine", prompt], greedy(2)), key)
    assert_idle(llm)


@given(key=KEYS, value=st.sampled_from([1, "x", None]), data=st.data())
def test_chats(llm: LLM, key: Any, value: Any, data: st.DataObject) -> None:
    chat = copy.deepcopy(CHAT)
    (_, *places) = mappings(chat)
    place = data.draw(st.sampled_from(places))
    # What belongs to one of a kind may be known in all of them; what the template reads is known.
    assume(not any(key in each for each in mappings(CHAT)))
    assume(key not in ("index", "annotations", "reasoning", "reasoning_content", "audio",
                       "function_call", "documents", "add_generation_prompt",
                       "continue_final_message"))  # fmt: skip
    assume(key not in ("", "length", "object") and f"'{key}'" not in TEMPLATE)
    if isinstance(key, str) and place is chat["chat_template_kwargs"]:
        prompt = llm.chat(**chat, sampling_params=greedy(1))[0].prompt
        place[key] = value  # logged, since callers of several models give all of them the same
        assert llm.chat(**chat, sampling_params=greedy(1))[0].prompt == prompt
        return
    place[key] = value
    is_refused(lambda: llm.chat(chat.pop("messages"), greedy(2), **chat), key)


@pytest.mark.parametrize("key", ["multi_modal_data", "prompt_embeds", "encoder_prompt", "promt"])
def test_streams(tiny: TinyModels, device: str, key: str) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"device": device, "num_blocks": 65, "max_num_seqs": 4}
        async with AsyncLLM(str(text_model(tiny).path), **options) as llm:
            for stream in (
                llm.generate({"prompt": "a", key: 1}, greedy(2)),
                llm.chat([{"role": "user", "content": "x", key: 1}], greedy(2)),
                llm.chat([{"role": "user", "content": "x"}], tools=[{**TOOL, key: 1}]),
            ):
                with pytest.raises(RequestError, match=f"'{key}'"):
                    await anext(aiter(stream))

    asyncio.run(main())
