"""Masks that are kept and sent in part are those that xgrammar fills."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import pytest
import torch

from reprise import LLM, StructuredOutputsParams
from reprise.engine.structured import Grammar, masks
from reprise.engine.structured.masks import MaskRows

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
        self.rows = MaskRows(vocab_size)
        self._device = np.zeros((16, -(-vocab_size // 32)), dtype=np.int32)
        self._alone = torch.empty((1, self._device.shape[1]), dtype=torch.int32)
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
        for number, (_, grammar, _) in enumerate(self._grammars):
            grammar.fill(rows, number)
        begin, words = rows.settle(len(self._grammars))
        self._device[begin : begin + len(words)] = words
        for number, (compiled, grammar, tokens) in enumerate(self._grammars):
            fresh = MaskRows(self._device.shape[1] * 32)
            fresh.begin(1)
            again = Grammar(compiled, self._held, 4)
            again.take(tokens, 0)
            again.fill(fresh, 0)
            expected = fresh.settle(1)[1][0]
            wrong += not np.array_equal(expected, self._device[number])
            bits = np.unpackbits(expected.view(np.uint8), bitorder="little")
            allowed = set(np.flatnonzero(bits).tolist()) - self._held
            self._take(grammar, tokens, sorted(allowed))
        if self._random.random() < 0.3:  # one ends: those behind it move up
            del self._grammars[self._random.randrange(len(self._grammars))]
            self._begin(self._random.randrange(len(GRAMMARS)))
        return wrong

    def _take(self, grammar: Grammar, tokens: list[int], allowed: list[int]) -> None:
        if tokens and self._random.random() < 0.1:  # as behind a step that was lost
            del tokens[self._random.randrange(len(tokens)) :]
            grammar.take([], len(tokens))
        elif allowed:
            token = self._random.choice(allowed)
            if grammar.take([token], len(tokens)):
                tokens.append(token)


@pytest.mark.parametrize(("seed", "steps"), [(0, 25), *(pytest.param(
    seed, 300, marks=pytest.mark.long) for seed in range(1, 6))])  # fmt: skip
def test_masks_are_those_of_each_sequence_alone(llm: LLM, seed: int, steps: int) -> None:
    walk = Walk(llm, seed)
    assert [walk.step() for _ in range(steps)] == [0] * steps
    assert walk.rows.num_kept > 2 * steps


class One:
    """A sequence, and its mask as a step has it."""

    def __init__(self, llm: LLM, what: dict[str, Any], least: int = 0) -> None:
        compiled = llm.engine.compiler.compile(StructuredOutputsParams(**what))
        self.rows = MaskRows(llm.engine.vocab_size)
        self.grammar = Grammar(compiled, llm.engine.eos_token_ids, least)
        self._mask: set[int] = set()

    def allowed(self) -> set[int]:
        self.rows.begin(1)
        self.grammar.fill(self.rows, 0)
        for row in self.rows.settle(1)[1]:
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")
            self._mask = set(np.flatnonzero(bits).tolist())
        return self._mask


def test_what_was_taken_back_is_another_state(llm: LLM) -> None:
    """Within a rule nothing tells what follows it but what came before, here another letter."""
    one = One(llm, {"grammar": 'root ::= "a" x "e" | "b" x "o"\nx ::= "k"+ "r"'})
    ids = llm.get_tokenizer().convert_tokens_to_ids
    a, b, k, re, ro = ids(["a", "b", "k", "re", "ro"])
    found = []
    for letter in (a, b):
        assert one.grammar.take([letter, k], 0) == 2
        found.append((one.grammar._state(), one.allowed()))
    (state, allowed), (other_state, other_allowed) = found
    assert state[1:] == other_state[1:]  # type: ignore[index]
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


def test_states_that_are_told_wrong_are_found(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every mask is kept; then one is compared, and none is any more."""
    monkeypatch.setattr(Grammar, "_state", lambda self: (self._past, "always"))
    monkeypatch.setattr(masks, "CHECKED", 7)
    walk = Walk(llm, 0)
    with caplog.at_level(logging.ERROR, masks.__name__):
        wrong = [walk.step() for _ in range(25)]
    assert sum(wrong) > 0
    assert wrong[-5:] == [0] * 5
    assert [each.levelname for each in caplog.records] == ["ERROR"]


def test_what_a_version_does_not_tell_is_filled_each_time(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(xgrammar.GrammarMatcher, "_debug_print_internal_state")
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


def test_where_no_mask_can_be_kept_few_are_looked_at_and_where_they_can_all_are() -> None:
    rows, looks = MaskRows(32), []
    for step in range(40):
        rows.begin(4)
        looks.append(rows.looks)
        for row in range(4):
            state = (step if step < 20 else "alike") if rows.looks else None
            rows.allow(row, _AllowAll(), (), None, state=state, later=False)
        rows.settle(4)
    assert sum(looks[:20]) <= 6
    assert sum(looks[28:]) == 12
    assert rows.num_kept >= 4 * 11


class _AllowAll:
    """A matcher."""

    def fill_next_token_bitmask(self, masks: torch.Tensor, row: int) -> None:
        masks[row] = -1
