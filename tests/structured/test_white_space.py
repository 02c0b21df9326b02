"""White space between the parts of JSON is bounded, and within texts it is not."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from reprise import LLM, SamplingParams, StructuredOutputsParams
from reprise.engine.structured import Grammar
from reprise.engine.structured.masks import MaskTable
from reprise.engine.structured.white_space import MOST, TURN, WhiteSpace, named_by

NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 9}
BLANKS = [" ", "\n", "\t", "\r", "\n\n"]
"""Tokens of the demo model."""


def mask(*tokens: int, size: int) -> np.ndarray[Any, Any]:
    words = np.zeros(-(-size // 32), dtype=np.uint32)
    for each in tokens:
        words[each // 32] |= np.uint32(1 << each % 32)
    return words.view(np.int32)


def test_tokens_of_white_space_alone_are_told() -> None:
    texts = [b"t", b"", b" ", b"\n\t ", b' "', b"A", b"\x0b", *[b"x"] * 30, b"\r"]
    found = WhiteSpace.of(texts)
    assert found.lengths == {2: 1, 3: 3, 37: 1}
    assert found.sign == 5  # true begins with a t
    size = len(texts)
    for before, more, after in (
        ((2, 3, 4, 37), 0, (4,)),
        ((2, 3, 4, 5, 37), 0, (2, 3, 4, 5, 37)),  # a text may have more
        ((2, 3, 37), 0, (2,)),  # nothing else may come: one kind, then another
        ((2, 3, 37), TURN, (37,)),
        ((2, 3, 37), 2 * TURN, (2,)),
        ((3,), 0, (3,)),
        ((0, 4), 0, (0, 4)),
    ):
        words = mask(*before, size=size)
        found.limit(words, found.turn(MOST + more))
        assert np.array_equal(words, mask(*after, size=size))


def lost(llm: LLM, what: dict[str, Any], count: int = 150, **params: Any) -> str:
    """What a model writes that would write nothing but white space."""
    tokenizer = llm.get_tokenizer()
    tokens = [tokenizer.encode(each, add_special_tokens=False) for each in BLANKS]
    assert all(len(each) == 1 for each in tokens)
    bias = {token: 50.0 for (token,) in tokens}
    wanted = StructuredOutputsParams(**what)
    params = {"temperature": 1.0, "seed": 0, **params}
    given = SamplingParams(max_tokens=count, logit_bias=bias, structured_outputs=wanted, **params)
    (output,) = llm.generate("Once", given, use_tqdm=False)
    return output.outputs[0].text


def longest(text: str) -> int:
    return max(map(len, re.findall(r"[ \t\n\r]+", text)))


@pytest.mark.parametrize(
    "what",
    [
        {"json": NUMBERS},
        {"structural_tag": {"type": "structural_tag", "format": {
            "type": "tag", "begin": "<n>", "end": "</n>",
            "content": {"type": "json_schema", "json_schema": NUMBERS}}}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_is_lost_goes_on(llm: LLM, what: dict[str, Any], temperature: float) -> None:
    text = lost(llm, what, temperature=temperature)
    assert MOST <= longest(text) < MOST + max(map(len, BLANKS))
    assert len(re.findall(r"[ \t\n\r]+", text)) > 2


@pytest.mark.parametrize("end", ["\n</n>", "\n    </n>", " </n>", "\t\t</n>"])
def test_a_text_that_begins_with_it_is_come_to(llm: LLM, end: str) -> None:
    """Where white space may come and nothing else but a text that begins with some."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    content = {"type": "json_schema", "json_schema": schema, "style": "qwen_xml"}
    form = {"type": "tag", "begin": "<n>", "content": content, "end": end}
    tag = {"structural_tag": {"type": "structural_tag", "format": form}}
    assert lost(llm, tag, count=300).endswith(end)


def test_the_bound_is_of_each_place_and_holds_with_drafts_of_it_too(llm: LLM) -> None:
    """A draft that is taken back does not count."""
    compiled = llm.engine.compiler.compile(StructuredOutputsParams(json=NUMBERS))
    assert compiled.spaces is not None
    blank = next(token for token, length in compiled.spaces.lengths.items() if length == 1)
    (opening,) = llm.get_tokenizer().encode("[", add_special_tokens=False)
    grammar, masks = Grammar(compiled, frozenset({0}), 0), MaskTable(llm.engine.vocab_size)
    assert grammar.take([opening], 0) == 1
    assert grammar.take([blank] * (MOST - 2), 1) == MOST - 2
    masks.begin(4)
    places = grammar.fill(masks, [blank, blank, blank])
    table = np.zeros((len(masks), -(-llm.engine.vocab_size // 32)), dtype=np.int32)
    for begin, words in masks.settle(np.array(places)):
        table[begin : begin + len(words)] = words
    free = [bool(table[place][blank // 32] >> blank % 32 & 1) for place in places]
    assert free == [True, True, False, False]
    masks.begin(1)
    assert grammar.fill(masks) == places[:1]
    assert not masks.settle(np.array(places[:1]))


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"type": "string", "pattern": "^[a-z_-]+[^<>]*$"}, False),
        ({"type": "string", "pattern": r"(<|([^{<\s]|<[^|])[\s\S]*)?"}, False),
        ({"type": "string", "pattern": r"[\w ]+|\S\D."}, False),
        ({"properties": {"pattern": {"type": "string", "description": "a" + " " * 99}}}, False),
        ({"properties": {"description": {"const": "a" + " " * MOST}}}, True),
        ({"properties": {"a" + " " * MOST: True}}, True),
        ({"patternProperties": {"^ *a$": True}}, True),
        *(({"items": [{"pattern": each}]}, True) for each in (
            r"\s*a", r"\W", "[^a-z]", r"[^\w]", r"[^\S]", "[ -]+", r"\x20*", "a *", r"[]\t]")),
    ],
)  # fmt: skip
def test_what_may_need_more_is_told(document: dict[str, Any], found: bool) -> None:
    assert named_by(document) is found


def test_texts_may_have_any(llm: LLM) -> None:
    for what in ({"json": {"type": "string"}}, {"regex": r"[ x]{100}\n{60}"}):
        assert longest(lost(llm, what)) >= 60
    sixty, many = "[ x]{60}", [{"enum": ["x" + " " * 60 + "y", "x" + " " * MOST + "z"]}]
    told = {"type": "regex", "pattern": sixty}, {"type": "grammar", "grammar": f"root ::= {sixty}"}
    for content in (*told, {"type": "const_string", "value": " " * 60}):
        form = {"type": "tag", "begin": "<n>", "content": content, "end": "</n>"}
        tag = {"type": "structural_tag", "format": form}
        assert longest(lost(llm, {"structural_tag": tag})) == 60
    for schema in ({"type": "string", "pattern": f"^{sixty}$"}, *many):
        assert longest(lost(llm, {"json": schema}, temperature=0.0)) >= 60
    between = {"type": "object", "properties": {"a": {"enum": ["x" + " " * 60 + "y"]}},
               "required": ["a"]}  # fmt: skip
    text = lost(llm, {"json": between, "disable_any_whitespace": True}, count=100)
    assert json.loads(text) == {"a": "x" + " " * 60 + "y"}
    text = lost(llm, {"json": {"enum": ["x" + " " * 60 + "y"]}}, count=200)
    assert text.strip().startswith('"x' + " " * 60 + "y")
