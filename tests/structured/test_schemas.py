"""Which schemas are followed, and that those which are not are refused by name."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from itertools import combinations, starmap
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from schemas import FOLLOWED, IGNORED, LEAVES

from reprise import LLM, SamplingParams, StructuredOutputsParams
from reprise.errors import RequestError
from reprise.json_schema import MAX_DEPTH, _all_apart, _kinds, _values, check_schema
from reprise.patterns import check_pattern, check_text_pattern
from reprise.structured_outputs import MAX_SOURCE

jsonschema = pytest.importorskip("jsonschema")

VALUES: list[Any] = [
    0, 1, 2, 3, 5, -1, -7, 1.5, 17, 100, "", "a", "ab", "abcdef", "cat-12", "2020-01-01",
    "2020-13-45", "1.2.3.4", "12:00:00Z", "2020-01-01T12:00:00Z", "fixed", "red", "two",
    "123e4567-e89b-12d3-a456-426614174000", "unknown", "otherwise", True, False, None, [], [1],
    [1, 1], [1, 2], [True], [True, "x"], [True, "x", 1], [True, False, True, True], {}, {"a": 1},
    {"a": "x"}, {"a": True}, {"a": True, "z": 1}, {"b": True}, {"b": True, "a": 1},
    {"a": 1, "b": True}, {"a": 3, "b": True}, {"b": True, "c": None}, {"a": "x", "b": "y"},
    {"inner": {}}, {"inner": {"deep": 1}}, {"kind": "a", "x": None}, {"kind": "b", "x": None},
    {"kind": "b", "y": True}, {"value": 1}, {"value": True, "n": 0}, {"one": None}, {"one": 2},
]  # fmt: skip


def test_outputs_validate(llm: LLM) -> None:
    assert len(FOLLOWED) >= 200
    params = [
        SamplingParams(
            structured_outputs=StructuredOutputsParams(
                json=schema, disable_any_whitespace=number % 16 != 0
            ),
            max_tokens=96, temperature=1.0, seed=number,
        )
        for number, schema in enumerate(FOLLOWED)
    ]  # fmt: skip
    outputs = llm.generate(["Once upon a time"] * len(params), params, use_tqdm=False)
    ended = 0
    for schema, output in zip(FOLLOWED, outputs, strict=True):
        found = output.outputs[0]
        if found.finish_reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(found.text), schema)
    print(f"{ended} of {len(FOLLOWED)} schemas: the output ended, and validates")
    assert ended >= 0.9 * len(FOLLOWED)  # the others write digits of a second


def test_what_a_grammar_accepts_is_valid(llm: LLM) -> None:
    """Of values that no model happened to write, too."""
    import xgrammar

    compiler = llm.engine.compiler
    for schema in LEAVES:
        compiled = compiler.compile(StructuredOutputsParams(json=schema))
        accepted = []
        for value in VALUES:
            matcher = xgrammar.GrammarMatcher(compiled.grammar)
            if matcher.accept_string(json.dumps(value)) and matcher.is_completed():
                accepted.append(value)
                jsonschema.validate(value, schema)
        valid = [each for each in VALUES if jsonschema.Draft202012Validator(schema).is_valid(each)]
        assert bool(accepted) or not valid or "format" in schema or "pattern" in schema, schema


WITH_LENGTHS: list[Any] = [
    {"type": "string", "minLength": 1},
    {"type": "string", "maxLength": 200},
    {"const": '[^\\"\\\\\\r\\n]'},
    {"type": "string", "pattern": '^[^\\x00-\\x1f"\\\\]{1,200}$'},
]


@pytest.mark.parametrize("schema", WITH_LENGTHS, ids=["least", "most", "const", "pattern"])
def test_texts_of_bounded_length_are_json(llm: LLM, schema: Any) -> None:
    """No control character is bare in JSON, a tab neither."""
    import xgrammar

    content = {"type": "json_schema", "json_schema": {"type": "array", "items": schema}}
    tag = {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}
    keyed = {"type": "object", "propertyNames": {"type": "string", "maxLength": 3}}
    named = {"$defs": {"a-b.c": {"type": "string", "maxLength": 9}}, "$ref": "#/$defs/a-b.c"}
    text = json.dumps(schema.get("const", "aü"), ensure_ascii=False)
    for wanted, around, right in (
        ({"json": schema}, "%s", text),
        ({"json": keyed}, "{%s: 1}", '"aü"'),
        ({"json": named}, "%s", '"aü"'),
        ({"structural_tag": {"type": "structural_tag", "format": tag}}, "<a>[%s]</a>", text),
    ):
        compiled = llm.engine.compiler.compile(StructuredOutputsParams(**wanted))
        bare = [f'"a{chr(code)}"' for code in range(32)]
        for each in (*bare, right):
            matcher = xgrammar.GrammarMatcher(compiled.grammar)
            assert matcher.accept_string(around % each) is (each == right), each


ORDINARY = {
    '^["“”]a$': "“a",
    "^[a-z]{1,200}.*$": "aZ",
    r"^\S+ \d{129,200}$": "é " + 200 * "1",
    r"^(a.){1,}(\w|[\u{4e00}-\u{9fff}]){0,200}$": "a中b中",
}
"""Patterns that may match what is written as an escape, and not where that would come bare."""


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_are_followed(llm: LLM, pattern: str) -> None:
    import xgrammar

    wanted = StructuredOutputsParams(json={"type": "string", "pattern": pattern})
    compiled = llm.engine.compiler.compile(wanted)
    text = f'"{ORDINARY[pattern]}'
    for each in (text + '"', text + "\t", text + '"a', '""' + text[1:]):
        matcher = xgrammar.GrammarMatcher(compiled.grammar)
        assert matcher.accept_string(each) is (each == text + '"'), each


@pytest.mark.parametrize(
    ("told", "patterns"),
    {
        "is not supported": [r"a\Nb", r"[\h]", r"\R"],
        "lacks its digits": [r"\x4g", r"\x{41}", r"\u12z"],
        "read in two ways": [r"[\1]", r"\012"],
        "is no character": [r"\ud83d\ude42", r"\u{110000}"],
        "a backslash ends it": ["a\\"],
    }.items(),
)
def test_escapes_that_would_be_read_as_something_else_are_refused(
    told: str, patterns: list[str]
) -> None:
    for each in patterns:
        with pytest.raises(RequestError, match=told):
            check_pattern(each, "regex")
    for each in (r"\u{1f642}{2}", r"\u{12345}", r"\x41\u0042\cA\0", r"[\b]\-\_\é"):
        check_pattern(each, "regex")


@pytest.mark.parametrize(
    "pattern",
    [r"a\n", r"\a", r"[\e]b", r'[\cA-\cB"\b]', r"[^\x20!#-\[\]-\u{10ffff}]", r"(?<n>[^\]]|b){129}"],
)
def test_patterns_of_escapes_are_refused(pattern: str) -> None:
    with pytest.raises(RequestError, match=r"escape|quote"):
        check_text_pattern(pattern, "pattern")


@pytest.mark.parametrize("sign", ["[", "{", "(", r"\u{41}", "a{1", "a"])
def test_patterns_are_looked_through_once(sign: str) -> None:
    """As long as can be, the time of one that begins anew at each sign would be hours."""
    check_text_pattern(sign * (MAX_SOURCE // 4 // len(sign)), "pattern")


def test_expressions_beside_schemas_stay_as_they_are(llm: LLM) -> None:
    import xgrammar

    tag = {"type": "tag", "begin": "<a>", "content": {"type": "regex", "pattern": r'[^"\\\r\n]'},
           "end": "</a>"}  # fmt: skip
    wanted = {"type": "structural_tag", "format": tag}
    compiled = llm.engine.compiler.compile(StructuredOutputsParams(structural_tag=wanted))
    assert xgrammar.GrammarMatcher(compiled.grammar).accept_string("<a>\t</a>")


@pytest.mark.parametrize("name", IGNORED)
def test_what_would_be_ignored_is_refused_by_name(llm: LLM, name: str) -> None:
    keyword = name.split()[0]
    for schema, path in (
        (IGNORED[name], "#"),
        ({"type": "array", "items": IGNORED[name]}, "#/items"),
    ):
        if path != "#" and "$ref" in json.dumps(schema):
            continue  # refers to its own root
        with pytest.raises(RequestError) as refusal:
            llm.generate("x", SamplingParams(structured_outputs={"json": schema}))
        assert f"structured_outputs.json at {path}" in str(refusal.value)
        if keyword in json.dumps(schema):
            assert keyword in str(refusal.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        False,
        {"type": "array", "items": {}, "minItems": 3, "maxItems": 2},
    ],
)
def test_what_nothing_matches_is_refused(llm: LLM, schema: Any) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs\.json"):
        llm.generate("x", SamplingParams(structured_outputs={"json": schema}))


ODD: list[Any] = [None, True, -1, 1.5, "", "x", [], {}, [[]], [{}], {"type": []}, {"const": {}}]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All places in a document: what holds them, and where."""
    if isinstance(value, dict | list):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield value, name
            yield from _places(value[name])


def test_any_value_at_any_place_is_refused_or_followed() -> None:
    for schema in map(json.dumps, FOLLOWED):
        for place in range(sum(1 for _ in _places(json.loads(schema)))):
            changed = json.loads(schema)
            holder, name = list(_places(changed))[place]
            for value in ODD:
                holder[name] = value
                with contextlib.suppress(RequestError):
                    check_schema(changed, "json")


@pytest.mark.parametrize(
    "later",
    [
        {"$ref": 5},
        {"$ref": "#/x"},
        {"type": 5},
        {"type": [[]]},
        {"type": "object", "required": [[]]},
        {"type": "object", "required": ["a"], "properties": [1]},
    ],
)
def test_what_is_referred_to_may_be_wrong(later: Any) -> None:
    """It is looked at behind what refers to it."""
    one = {"oneOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/c"}]}
    a = {"type": "object", "required": ["a"], "properties": {"a": {"const": 1}}}
    for other in (later, a):
        with pytest.raises(RequestError):
            check_schema({"$defs": {"a": one, "b": later, "c": other}, "$ref": "#/$defs/a"}, "json")


VALUE = st.recursive(
    st.sampled_from([0, 1, 1.0, True, False, None, "a", "b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xy"), inner),
    max_leaves=3,
)
BRANCH = st.recursive(
    st.one_of(
        st.booleans(),
        st.builds(lambda each: {"const": each}, VALUE),
        st.builds(lambda each: {"enum": each}, st.lists(VALUE, min_size=1, max_size=3)),
        st.builds(lambda each: {"type": each}, st.sampled_from(["string", "integer", "number",
                  "object", "array", ["string", "null"], ["object", "boolean"]])),
        st.just({}),
    ),
    lambda inner: st.builds(
        lambda properties, required: {
            "type": "object", "properties": properties,
            "required": [each for each in required if each in properties],
        },
        st.dictionaries(st.sampled_from("kl"), inner), st.sets(st.sampled_from("kl")),
    ),
    max_leaves=4,
)  # fmt: skip


def _apart(one: Any, other: Any) -> bool:
    """Of two, as they are told apart pair by pair."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    values = [_values(each) for each in (one, other)]
    if values[0] is not None and values[1] is not None:
        return not any(mine == yours for mine in values[0] for yours in values[1])
    kinds = [_kinds(each) for each in (one, other)]
    if all(kinds) and not kinds[0] & kinds[1]:
        return True
    if kinds != [{"object"}, {"object"}]:
        return False
    names = set(one.get("required", [])) & set(other.get("required", []))
    return any(_apart(one["properties"][name], other["properties"][name]) for name in names)


@given(st.lists(BRANCH, min_size=1, max_size=5))
def test_branches_are_told_apart_as_pairs_of_them_are(branches: list[Any]) -> None:
    assert _all_apart(branches) == all(starmap(_apart, combinations(branches, 2)))


def test_thousands_of_branches_are_told_apart_in_no_time() -> None:
    """Whoever has one looked at keeps a thread of the server busy."""

    def of(kind: str, value: Any) -> dict[str, Any]:
        tag = {"k": {"const": value}, "l": {"enum": [value, f"{value}"]}}
        return {"type": "object", "properties": tag, "required": [kind]}

    began = time.thread_time()
    check_schema({"oneOf": [{"const": each} for each in range(3000)]}, "json")
    check_schema({"oneOf": [{"enum": [each * 2, each * 2 + 1]} for each in range(3000)]}, "json")
    check_schema({"oneOf": [of("k", each) for each in range(1500)]}, "json")
    check_schema({"oneOf": [of("l", each) for each in range(1500)]}, "json")
    for number in (30, 2000):
        with pytest.raises(RequestError, match="oneOf of schemas that may overlap"):
            check_schema({"oneOf": [of("kl"[each % 2], each) for each in range(number)]}, "json")
    assert time.thread_time() - began < 5


def test_depth_and_counts_are_bounded() -> None:
    deep: Any = {"type": "integer"}
    for _ in range(MAX_DEPTH + 1):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestError, match="nested more than"):
        check_schema(deep, "schema")
    with pytest.raises(RequestError, match="maxItems=100000"):
        check_schema({"type": "array", "maxItems": 100000}, "schema")
