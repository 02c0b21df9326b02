"""Prompts and outputs of real tokenizers against the ``tokenizers`` library, which reads the same
file."""

# ruff: noqa: RUF001
from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
from real_tokenizers import NAMES, real_tokenizer
from tokenizers import Tokenizer

from reprise import SamplingParams
from reprise.engine import chat_prompt
from reprise.engine.detokenizer import Detokenizer, TokenTexts
from reprise.engine.prompt import prepare
from reprise.loading.tokenizer import end_of_text_id, load_tokenizer

COUNT = 2000
PIECES = {
    "words": ["Once upon a time", " the", " don't", "HELLO", " 'll", "Grüße", " façade", "naïve "],
    "digits": ["2026", " 1", "3.14159", "1,000,000", "0x1F", "١٢٣", "²"],
    "spaces": [" ", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000", "\u200b"],
    "code": ["def f(x):\n\treturn x", "</div>", "a[i]+=1;", "{}", "==", "://", '\\"', "#!/"],
    "scripts": ["漢字とかな", "한국어", "русский", "ελληνικά", "हिन्दी", "العربية", "e\u0301"],
    "emoji": ["👍🏽", "👩‍👩‍👧", "🎉🎉", "🇩🇪", "✅", "☹️"],
    "odd": ["\ufffd", "\x00", "\x7f", "\u2028", "\ufeff", "\U0010ffff", "ﬁ", "ℵ", "\u0300"],
    "special": ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<think>",
                "<｜end▁of▁sentence｜>", "<｜User｜>", "<|im_start|> ", "<|im_", "▁"],
}  # fmt: skip


def strings(seed: int) -> list[str]:
    """Mixtures of all kinds, and bytes that are nobody's text."""
    generator = random.Random(seed)
    made = []
    for index in range(COUNT):
        if index % 10 == 0:
            made.append(generator.randbytes(20).decode(errors="replace"))
            continue
        kinds = generator.choices(list(PIECES.values()), k=generator.randint(1, 8))
        made.append("".join(map(generator.choice, kinds)))
    return made


@pytest.fixture(scope="module", params=NAMES)
def place(request: pytest.FixtureRequest) -> Path:
    return real_tokenizer(request.param)


@functools.cache
def loaded(place: Path) -> tuple[Any, Tokenizer]:
    return load_tokenizer(place), Tokenizer.from_file(str(place / "tokenizer.json"))


def text_of(texts: TokenTexts, ids: list[int], skip: bool) -> str:
    detokenizer = Detokenizer(texts, [], SamplingParams(skip_special_tokens=skip))
    assert detokenizer.append(ids) is None
    detokenizer.finish()
    return detokenizer.text


def test_prompts_and_outputs(place: Path) -> None:
    tokenizer, library = loaded(place)
    texts = TokenTexts(tokenizer)
    for index, text in enumerate(strings(seed=1)):
        ids = library.encode(text).ids
        assert prepare(text, tokenizer, 10**6).token_ids == ids if ids else not text
        skip = index % 2 == 0
        assert text_of(texts, ids, skip) == library.decode(ids, skip_special_tokens=skip)


def test_outputs_of_any_ids(place: Path) -> None:
    """Tokens cut characters anywhere, also where the tokenizer never would."""
    tokenizer, library = loaded(place)
    texts, generator = TokenTexts(tokenizer), random.Random(2)
    short = [token for token in range(len(tokenizer)) if len(library.id_to_token(token) or "") < 3]
    for index in range(COUNT // 4):
        known = range(len(tokenizer)) if index % 2 else short
        ids = generator.choices(known, k=20)
        assert text_of(texts, ids, True) == library.decode(ids)
        assert text_of(texts, ids, False) == library.decode(ids, skip_special_tokens=False)


def test_special_tokens(place: Path) -> None:
    tokenizer, library = loaded(place)
    ends = {"qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "deepseek_v3": "<｜end▁of▁sentence｜>"}
    (end,) = (token for name, token in ends.items() if name in place.name)
    assert tokenizer.eos_token == end
    assert end_of_text_id(tokenizer) == library.token_to_id(end)


def test_chats(place: Path) -> None:
    """Parts are their text; the whole equals transformers' rendering of plain strings."""
    tokenizer, library = loaded(place)
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße 👍🏽"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "one\ntwo"},
    ]
    parts = [{"type": "text", "text": each} for each in ("one", "two")]
    given = [{**plain[0], "role": "developer"}, *plain[1:3], {"role": "user", "content": parts}]
    expected = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    found = chat_prompt(tokenizer, given)
    assert found["prompt"] == expected
    assert found["prompt_token_ids"] == library.encode(expected, add_special_tokens=False).ids


def test_tool_calls(place: Path) -> None:
    """The same whether arguments are JSON or a dictionary; none of it twice, as Python or lost."""
    tokenizer, _ = loaded(place)
    arguments = '{"city": "Köln"}'

    def render(content: object, arguments: object) -> str:
        call = {"type": "function", "id": "1", "function": {"name": "rain", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "rain?"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "yes"}]},
        ]
        return chat_prompt(tokenizer, messages)["prompt"]

    if "llama3_1" in place.name:  # of a time when it had no tools
        with pytest.raises(ValueError, match="does not show tool calls"):
            render(None, arguments)
        return
    found = [render(None, arguments), render(None, {"city": "Köln"})]
    assert found[0] == found[1]
    assert arguments in found[0]
    assert "yes" in found[0]
    assert "None" not in found[0]
    # DeepSeek's template shows one of them.
    if "deepseek_v3" in place.name:
        with pytest.raises(ValueError, match="tool calls without content alone"):
            render("let me see", arguments)
    else:
        assert "let me see" in render("let me see", arguments)
