"""Masks that are kept and sent in part are those that xgrammar fills."""

from __future__ import annotations

import functools
import logging
import random
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import python_calls_of_a_step

from reprise import LLM, SamplingParams, StructuredOutputsParams
from reprise.engine.structured import Grammar, automaton, masks
from reprise.engine.structured.automaton import Automaton
from reprise.engine.structured.masks import MaskTable
from reprise.engine.structured.white_space import MOST, TURN

xgrammar = pytest.importorskip("xgrammar")

GRAMMARS: list[dict[str, Any]] = [
    {"json": {"type": "string"}},
    {"json": {"type": "string", "maxLength": 9}},
    {"json": {"type": "array", "items": {"type": "object", "properties": {
        "a": {"type": "string"}, "b": {"enum": ["xx", "xy"]}}, "required": ["a"]}}},
    {"regex": "[ab]*b"},
    {"regex": "([a-z]{2,5} ){3,30}x*"},
    {"regex": ".*x.*"},
    {"grammar": 'root ::= "a" root "b" | [a-z]* "z"'},
    {"regex": "[ab]{3,200}c(é|[^a-yß])*"},
    {"json_object": True},
]  # fmt: skip


class Walk:
    """Sequences that take tokens at random, their masks in one step, and who has got them."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self._compiled = [
            llm.engine.compiler.compile(StructuredOutputsParams(**each)) for each in GRAMMARS
        ]
        self._random = random.Random(seed)
        self._held = llm.engine.eos_token_ids
        vocab_size = llm.engine.vocab_size
        self.rows = MaskTable(vocab_size)
        self._device = np.zeros((masks.KEPT + 80, -(-vocab_size // 32)), dtype=np.int32)
        self._grammars: list[tuple[Any, Grammar, list[int]]] = []
        for number in range(14):
            self._begin(number % len(GRAMMARS))

    def _begin(self, number: int) -> None:
        compiled = self._compiled[number]
        self._grammars.append((compiled, Grammar(compiled, self._held, 4), []))

    def step(self) -> int:
        """Returns how many masks differ from those that are filled for a sequence alone."""
        rows, wrong = self.rows, 0
        rows.begin(len(self._grammars))
        texts = [grammar for _, grammar, _ in self._grammars]
        if self._random.random() < 0.5:
            places = rows.of(texts)
        else:
            places = [grammar.fill(rows)[0] for grammar in texts]
        for begin, words in rows.settle(np.array(places)):
            self._device[begin : begin + len(words)] = words
        for place, (compiled, grammar, tokens) in zip(places, self._grammars, strict=True):
            expected = self._alone(compiled, tokens)
            wrong += not np.array_equal(expected, self._device[place])
            bits = np.unpackbits(expected.view(np.uint8), bitorder="little")
            allowed = set(np.flatnonzero(bits).tolist()) - self._held
            self._take(grammar, tokens, sorted(allowed))
        if self._random.random() < 0.3:  # one ends: those behind it move up
            del self._grammars[self._random.randrange(len(self._grammars))]
            self._begin(self._random.randrange(len(GRAMMARS)))
        return wrong

    def _alone(self, compiled: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
        """The mask of a sequence that xgrammar alone follows, as nothing else does."""
        again = Grammar(replace(compiled, automaton=None), self._held, 4)
        assert again.take(tokens, 0) == len(tokens)
        fresh = MaskTable(self._device.shape[1] * 32)
        fresh.begin(1)
        ((_, words),) = fresh.settle(np.array(again.fill(fresh)))
        return words[0]

    def _take(self, grammar: Grammar, tokens: list[int], allowed: list[int]) -> None:
        if tokens and self._random.random() < 0.1:  # as behind a step that was lost
            del tokens[self._random.randrange(len(tokens)) :]
            grammar.take([], len(tokens))
        elif allowed:
            token = self._random.choice(allowed)
            quickly = self._random.random() < 0.5 and grammar.follow(token, len(tokens))
            if quickly or grammar.take([token], len(tokens)):
                tokens.append(token)


@pytest.mark.parametrize(("seed", "steps"), [(0, 25), *(pytest.param(
    seed, 300, marks=pytest.mark.long) for seed in range(1, 6))])  # fmt: skip
def test_masks_are_those_of_each_sequence_alone(llm: LLM, seed: int, steps: int) -> None:
    walk = Walk(llm, seed)
    assert [walk.step() for _ in range(steps)] == [0] * steps
    assert walk.rows.num_kept > 2 * steps


def test_a_token_that_is_followed_leaves_what_one_that_is_taken_does(llm: LLM) -> None:
    """White space up to its bound, ends, tokens that are refused, and those behind a minimum."""
    chance, tokenizer = random.Random(0), llm.get_tokenizer()
    (letter,) = tokenizer.encode("b", add_special_tokens=False)
    held, least = llm.engine.eos_token_ids | {letter}, 4
    blanks = [*tokenizer.encode(" ", add_special_tokens=False),
              *tokenizer.encode("\n", add_special_tokens=False)]  # fmt: skip
    rows, followed, ends, crowds = MaskTable(llm.engine.vocab_size), 0, 0, 0
    for number in range(60):
        what = {"regex": "[ab]*b"} if number % 2 else {"json_object": True}
        compiled = llm.engine.compiler.compile(StructuredOutputsParams(**what))
        one, other = (Grammar(compiled, held, least) for _ in range(2))
        for each in (one, other):
            each.keep_in(rows)
        for length in range(40):
            rows.begin(1)
            (place,) = one.fill(rows)
            rows.settle({place})
            bits = np.unpackbits(rows._words[place].view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits).tolist()
            spaces = [each for each in blanks if each in allowed]
            token = chance.choice(spaces if spaces and chance.random() < 0.97 else allowed)
            if chance.random() < 0.03:
                token = chance.choice([0, *held])
            taken = one.take([token], length)
            assert not other.follow(token, length + 1)
            if other.follow(token, length):
                followed += 1
            else:
                assert other.take([token], length) == taken
            assert (one.num_tokens, one.ended) == (other.num_tokens, other.ended)
            assert one.state is other.state
            assert one.places is other.places
            crowds += one.state is None and not one.ended
            ends += one.ended
            if one.ended or not taken:
                break
    assert followed > 200
    assert min(ends, crowds) > 5


def test_masks_of_a_step_do_not_take_each_others_places(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is kept is asked for behind one that is new."""
    monkeypatch.setattr(masks, "KEPT", 1)
    compiled = [
        llm.engine.compiler.compile(StructuredOutputsParams(regex=each)) for each in ("a+", "b+")
    ]
    texts = [Grammar(each, llm.engine.eos_token_ids, 0) for each in compiled]
    rows = MaskTable(llm.engine.vocab_size)
    rows.begin(2)
    (kept,) = rows.of(texts[1:])
    rows.settle({kept})
    rows.begin(2)
    new, again = rows.of(texts)
    assert again == kept != new


def test_no_mask_is_kept_of_a_step_that_was_lost_nor_of_a_grammar_that_is_given_up(
    llm: LLM,
) -> None:
    compiled = llm.engine.compiler.compile(StructuredOutputsParams(regex="lost+ or given up"))
    text, rows = Grammar(compiled, llm.engine.eos_token_ids, 0), MaskTable(llm.engine.vocab_size)

    def kept() -> int:
        before = rows.num_kept
        rows.begin(1)
        rows.settle(rows.of([text]))
        return rows.num_kept - before

    assert [kept(), kept()] == [0, 1]
    rows.forget()
    assert [kept(), kept()] == [0, 1]
    assert compiled.automaton is not None
    compiled.automaton.give_up("of a test")
    assert [kept(), kept()] == [0, 0]


class One:
    """A sequence, and its mask as a step has it."""

    def __init__(self, llm: LLM, what: dict[str, Any], least: int = 0) -> None:
        compiled = llm.engine.compiler.compile(StructuredOutputsParams(**what))
        self.rows = MaskTable(llm.engine.vocab_size)
        self.grammar = Grammar(compiled, llm.engine.eos_token_ids, least)
        self._masks: dict[int, np.ndarray[Any, Any]] = {}

    def allowed(self) -> set[int]:
        self.rows.begin(1)
        (place,) = self.grammar.fill(self.rows)
        for begin, words in self.rows.settle(np.array([place])):
            self._masks.update(enumerate(words.copy(), begin))
        bits = np.unpackbits(self._masks[place].view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())


def test_what_comes_behind_a_rule_is_part_of_a_state(llm: LLM) -> None:
    """Within the rule nothing tells it but what came before, here another letter."""
    one = One(llm, {"grammar": 'root ::= "a" x "e" | "b" x "o"\nx ::= "k"+ "r"'})
    ids = llm.get_tokenizer().convert_tokens_to_ids
    a, b, k, re, ro = ids(["a", "b", "k", "re", "ro"])
    found = []
    for letter in (a, b):
        assert one.grammar.take([letter, k, k], 0) == 3
        found.append((one.grammar._states[-1], one.allowed()))
        assert one.grammar.take([letter, k], 0) == 2
        assert one.grammar._states[-1] is found[-1][0] is not None
    (state, allowed), (other_state, other_allowed) = found
    assert state is not other_state
    assert (re in allowed, ro in allowed) == (True, False)
    assert (re in other_allowed, ro in other_allowed) == (False, True)


def test_a_text_that_is_long_enough_may_end_in_the_same_state(llm: LLM) -> None:
    one, ends = One(llm, {"regex": "a*"}, least=4), []
    (letter,) = llm.get_tokenizer().encode("a", add_special_tokens=False)
    for number in range(6):
        ends.append(bool(one.allowed() & llm.engine.eos_token_ids))
        assert one.grammar.take([letter], number) == 1
    assert ends == [False] * 4 + [True] * 2
    assert one.rows.num_kept > 0


@pytest.mark.parametrize("followed", [2, 64])
def test_states_that_are_told_wrong_are_found(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, followed: int
) -> None:
    """Every mask is kept; then one is compared, and none is any more."""
    monkeypatch.setattr(Automaton, "walk", lambda self, state, token: self.start)
    monkeypatch.setattr(masks, "CHECKED", 7)
    monkeypatch.setattr(masks, "FOLLOWED", followed)
    walk = Walk(llm, 0)
    with caplog.at_level(logging.ERROR, masks.__name__):
        wrong = [walk.step() for _ in range(25)]
    assert sum(wrong) > 0
    assert wrong[-5:] == [0] * 5
    assert [each.levelname for each in caplog.records] == ["ERROR"]


def test_an_engine_checks_the_masks_that_it_keeps(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Automaton, "walk", lambda self, state, token: self.start)
    monkeypatch.setattr(masks, "CHECKED", 7)
    monkeypatch.setattr(llm.engine.grammars, "_masks", MaskTable(llm.engine.vocab_size))
    wanted = StructuredOutputsParams(regex="[ab]{3,200}c")
    params = SamplingParams(max_tokens=12, temperature=0, structured_outputs=wanted)
    with caplog.at_level(logging.ERROR, masks.__name__):
        llm.generate(["Once"] * 2, params, use_tqdm=False)
    assert ["two masks for one state" in each.message for each in caplog.records] == [True]


def test_masks_of_long_texts_are_checked_as_often_with_few_tokens_a_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two texts, of which one ends before xgrammar has caught up with it."""
    monkeypatch.setattr(masks, "CHECKED", 64)
    monkeypatch.setattr(masks, "FOLLOWED", 4)
    (letter,) = llm.get_tokenizer().encode("a", add_special_tokens=False)
    texts = [One(llm, {"regex": "a*"}) for _ in range(2)]
    rows, checked, followed = texts[0].rows, [], []
    for step in range(200):
        running = [each.grammar for each in texts[step >= 34 :]]
        rows.begin(2)
        before = [each._followed for each in running]
        places = [each.fill(rows)[0] for each in running]
        followed += [each._followed - old for each, old in zip(running, before, strict=True)]
        if rows._doubted is not None:
            checked.append(step)
        rows.settle(np.array(places))
        for each in running:
            assert each.take([letter], step) == 1
    assert len(checked) >= 3
    assert max(followed[2:]) == 4


def test_an_automaton_that_refuses_what_is_allowed_is_given_up(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llm.engine.compiler, "_kept", OrderedDict())
    walk = Walk(llm, 2)
    monkeypatch.setattr(Automaton, "_find", lambda self, state, kind: None)
    with caplog.at_level(logging.ERROR, automaton.__name__):
        assert [walk.step() for _ in range(12)] == [0] * 12
    assert {each.levelname for each in caplog.records} == {"ERROR"}
    assert 0 < len(caplog.records) <= len(GRAMMARS)


def test_a_token_that_only_the_automaton_allows_ends_its_sequence(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llm.engine.compiler, "_kept", OrderedDict())
    a, b = llm.get_tokenizer().convert_tokens_to_ids(["a", "b"])
    one = One(llm, {"regex": "a{3}"})
    monkeypatch.setattr(Automaton, "walk", lambda self, state, token: state)
    with caplog.at_level(logging.ERROR, automaton.__name__):
        assert one.grammar.take([b], 0) == 1
        one.grammar._states[-1] = None  # whose mask is filled
        one.allowed()
    assert one.grammar.take([a], 1) == 0
    assert [each.levelname for each in caplog.records] == ["ERROR"]
    assert one.grammar.take([a], 0) == 1  # what was refused is taken back


@pytest.mark.parametrize("printer", [None, lambda grammar: 1 // 0, lambda grammar: "Rule 0: x"])
def test_what_a_version_does_not_print_is_filled_each_time(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, printer: Any
) -> None:
    monkeypatch.setattr(llm.engine.compiler, "_kept", OrderedDict())
    monkeypatch.delattr(xgrammar.testing, "_print_grammar_fsms")
    if printer is not None:
        monkeypatch.setattr(xgrammar.testing, "_print_grammar_fsms", printer, raising=False)
    walk = Walk(llm, 0)
    assert [walk.step() for _ in range(8)] == [0] * 8
    assert walk.rows.num_kept == 0


def test_masks_that_may_be_lost_are_sent_again(llm: LLM) -> None:
    walk = Walk(llm, 3)
    for lose in (walk.rows.send_again, walk.rows.forget):
        assert [walk.step() for _ in range(3)] == [0] * 3
        walk._device[:] = 5
        lose()
        assert walk.step() == 0


def test_where_there_is_room_for_few_those_of_a_step_stay(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer places than the step has masks, and than there are states."""
    monkeypatch.setattr(masks, "KEPT", 5)
    walk = Walk(llm, 4)
    assert [walk.step() for _ in range(12)] == [0] * 12
    assert walk.rows.num_kept > 12


def test_texts_that_have_had_enough_white_space_share_masks(llm: LLM) -> None:
    """Where a text that begins with some has to come, by how much came before, too."""
    object_ = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
    content = {"type": "json_schema", "style": "qwen_xml", "json_schema": object_ | {
        "additionalProperties": False}}  # fmt: skip
    form = {"type": "tag", "begin": "<n>", "content": content, "end": "\t\t</n>"}
    what = {"structural_tag": {"type": "structural_tag", "format": form}}
    encode = functools.partial(llm.get_tokenizer().encode, add_special_tokens=False)
    one, alone, count = One(llm, what), One(llm, what), 2 * TURN + 2
    alone.grammar.automaton, alone.grammar._states = None, [None]
    allowed: list[set[int]] = []
    for blank in (" ", "\n"):
        tokens = encode("<n><parameter=a>x</parameter>") + encode(blank) * (MOST - 1)
        for each in (one, alone):
            assert each.grammar.take(tokens, 0) == len(tokens)
        filled = 0
        for number in range(count):
            allowed.append(one.allowed())
            filled += len(one.rows._changed)
            assert allowed[-1] == alone.allowed()
            token = min(allowed[-1]) if number else encode(" ")[0]
            for each in (one, alone):
                assert each.grammar.take([token], each.grammar.num_tokens) == 1
    assert filled == 0
    assert allowed[:count] == allowed[count:]
    kinds = [encode(each)[0] for each in "\n \t"]
    assert allowed[1:count] == [{kind} for kind in kinds for _ in range(TURN)][: count - 1]


def test_a_text_costs_few_calls_a_step(llm: LLM) -> None:
    """Of Python functions, where its mask is kept: to follow a token, and no more."""
    wanted = StructuredOutputsParams(regex="[a-z ]*")
    few, many = (
        python_calls_of_a_step(
            llm, requests, 60, 24, 16, within="structured", structured_outputs=wanted
        )
        for requests in (2, 26)
    )
    assert (many - few) / 24 < 3


def test_places_of_masks_are_told_in_memory_of_the_table(llm: LLM) -> None:
    """Which a device copies from, and the next step writes to."""
    rows = MaskTable(llm.engine.vocab_size)
    first = rows.which([3, -1, 5])
    assert first.tolist() == [3, -1, 5]
    again = rows.which([7, 8])
    assert np.shares_memory(first, again)
    assert again.tolist() == [7, 8]
    assert rows.which(list(range(200))).tolist() == list(range(200))


def test_texts_of_one_grammar_share_masks(llm: LLM) -> None:
    """And lists do not become deeper with each element."""
    schema = {"type": "array", "items": {"type": "object", "properties": {
        "a": {"enum": ["x", "y"]}}, "required": ["a"]}}  # fmt: skip
    compiled = llm.engine.compiler.compile(StructuredOutputsParams(json=schema))
    rows, tokenizer = MaskTable(llm.engine.vocab_size), llm.get_tokenizer()
    grammars = [Grammar(compiled, frozenset(), 0) for _ in "xy"]
    tokens = [tokenizer.encode(f'[{{"a":"{each}"}},' + f'{{"a":"{each}"}},' * 6,
                               add_special_tokens=False) for each in "xy"]  # fmt: skip
    filled = 0
    for each in zip(*tokens, strict=True):
        rows.begin(2)
        places = [grammar.fill(rows)[0] for grammar in grammars]
        filled += len(rows._changed)
        rows.settle(np.array(places))
        for grammar, token in zip(grammars, each, strict=True):
            assert grammar.take([token], grammar.num_tokens) == 1
    assert len(tokens[0]) > 40
    assert filled < 25


def test_a_first_token_that_is_taken_back_may_open_a_thought_again(llm: LLM) -> None:
    encode, rows = llm.get_tokenizer().encode, MaskTable(llm.engine.vocab_size)
    (opens,), (closes,), (other,), (digit,) = map(encode, (" upon", " was", " there", "1"))
    compiled = llm.engine.compiler.compile(StructuredOutputsParams(regex="1{2}"))
    grammar = Grammar(compiled, llm.engine.eos_token_ids, 0, closes, opens)

    def allowed() -> set[int]:
        rows.begin(1)
        (place,) = rows.of([grammar])
        ((first, words),) = rows.settle({place})
        bits = np.unpackbits(words[place - first].view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())

    at_first = allowed()
    assert at_first == {opens, digit}
    assert grammar.take([opens, other, closes, digit, digit], 0) == 5
    for known, more, counts in (
        (4, [other], 0), (2, [closes, digit, other], 2), (0, [digit, opens], 1), (0, [other], 0),
        (0, [opens, digit, digit, digit, closes, digit], 6),
    ):  # fmt: skip
        assert grammar.take(more, known) == counts
    grammar.take((), 0)
    assert allowed() == at_first
