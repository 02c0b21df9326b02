"""An automaton follows the texts that xgrammar does, whatever their grammar, or says that it does
not."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from schemas import FOLLOWED

from reprise.engine.structured import automaton, rules
from reprise.engine.structured.automaton import Automaton, State
from reprise.engine.structured.rules import NotFollowed, Rules

xgrammar = pytest.importorskip("xgrammar")

STOP = 256
WORDS = [b"ab", b'"}', b'":', b"e\xcc", b"\xc3\xa9", b" {", b"aaa", b"x\n", b"]]", b"12",
         b"<f", b"<f=a>", b"</f>"]  # fmt: skip
TEXTS = [*(bytes((each,)) for each in range(256)), b"</s>", *WORDS]
"""Of the tokens: each byte is one."""

RECURSIVE = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {
    "v": {"type": "number"}, "c": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
    "required": ["v"]}}}  # fmt: skip
TAGS = {"type": "triggered_tags", "triggers": ["<f"], "tags": [
    {"begin": "<f=a>", "content": {"type": "regex", "pattern": "[ab]{1,3}"}, "end": "</f>"},
    {"begin": "<f=b>", "content": {"type": "any_text"}, "end": "</f>"}]}  # fmt: skip
GRAMMARS: list[str | dict[str, Any]] = [
    'root ::= "a" root "b" | [a-c]* "c"',
    'root ::= "a" x "e" | "b" x "o" | x\nx ::= "k"+ "r" | y y\ny ::= "" | "k" y',
    'root ::= (x y? z* "!")+\nx ::= [^\\n-z] | "q"\ny ::= "é" | z\nz ::= [ß-é] | "aa"',
    'root ::= x{2,140} "z" | x{0,3}\nx ::= "a" | "b" "c"?',
    'root ::= e\ne ::= "a" | "a" e e | "b" e "c"',
    'root ::= "(" root ")" root | "[" root "]" root | ""',
    'root ::= x\nx ::= y | "a" y x\ny ::= "" | [ab] "\\\\"? "\\"" y',
    {"type": "string", "maxLength": 4},
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"enum": ["x", 1, None]}}},
    {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "minItems": 2},
    RECURSIVE,
    TAGS,
    TAGS | {"at_least_one": True, "stop_after_first": True},
]  # fmt: skip


def compiled(grammar: str | dict[str, Any]) -> Any:
    info = xgrammar.TokenizerInfo(TEXTS, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[STOP])
    compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
    if isinstance(grammar, str):
        return compiler.compile_grammar(grammar)
    if grammar.get("type") == "triggered_tags":
        return compiler.compile_structural_tag({"type": "structural_tag", "format": grammar})
    return compiler.compile_json_schema(json.dumps(grammar))


def made(grammar: Any) -> Automaton:
    printed = xgrammar.testing._print_grammar_fsms(grammar.grammar)
    return Automaton(Rules.read(printed), TEXTS, frozenset({STOP}))


class Pair:
    """A text that both follow."""

    def __init__(self, grammar: Any, follower: Automaton) -> None:
        self._matcher, self._follower = xgrammar.GrammarMatcher(grammar), follower
        self.state: State | None = follower.start
        self._bits = torch.empty((1, -(-len(TEXTS) // 32)), dtype=torch.int32)

    def allowed(self) -> frozenset[int]:
        """By xgrammar's mask. The automaton takes the same tokens as the matcher, which may be more
        than the mask has."""
        self._matcher.fill_next_token_bitmask(self._bits, 0)
        bits = np.unpackbits(self._bits.numpy().view(np.uint8), bitorder="little")
        found = frozenset(np.flatnonzero(bits[: len(TEXTS)]).tolist())
        assert self.state is not None
        taken = {each for each in range(len(TEXTS)) if self._follower.walk(self.state, each)}
        assert taken == {each for each in range(len(TEXTS)) if self._would_take(each)} >= found
        return found

    def _would_take(self, token: int) -> bool:
        taken = self._matcher.accept_token(token)
        if taken:
            self._matcher.rollback(1)
        return bool(taken)

    def take(self, token: int) -> None:
        assert self._matcher.accept_token(token)
        assert self.state is not None
        self.state = self._follower.walk(self.state, token)


@pytest.mark.parametrize("of", [
    *GRAMMARS, *(pytest.param(each, marks=pytest.mark.long) for each in FOLLOWED)
])  # fmt: skip
def test_it_takes_what_xgrammar_takes_and_one_state_has_one_mask(of: Any) -> None:
    grammar = compiled(of)
    follower, chance = made(grammar), random.Random(0)
    masks: dict[State, frozenset[int]] = {}
    steps = 0
    for _ in range(6):
        pair = Pair(grammar, follower)
        for _ in range(30):
            allowed = pair.allowed()
            steps += 1
            assert pair.state is not None
            assert masks.setdefault(pair.state, allowed) == allowed
            ends = allowed - {STOP}
            if not ends:
                break
            pair.take(chance.choice(sorted(ends)))
    assert follower.followed
    assert len(masks) < steps  # the first has come again


def test_every_byte_is_read_as_it_is_printed() -> None:
    byte = [f'"\\x{each:02x}"' for each in range(1, 128)]
    follower = made(compiled("root ::= " + " | ".join(byte)))
    assert [each for each in range(256) if follower.walk(follower.start, each)] == [*range(1, 128)]


@pytest.mark.parametrize(("grammar", "why"), [
    ('root ::= root "a" | "b"', "begins with itself"),
    ('root ::= x "a" | "b"\nx ::= y root "c"\ny ::= "" | "z"', "begins with itself"),
    ("root ::= " + " | ".join(f'x{n} "a"' for n in range(1200)) + "".join(
        f'\nx{n} ::= "b{n}" x{(n + 1) % 1200} | "c"' for n in range(1200)), "too many ways"),
    ('root ::= x{0,9000} "z"\nx ::= "a" | ""', "too many ways"),
    ('root ::= x{0,20000} "z"\nx ::= "a" | "bc"', "counts beyond"),
    ("root ::= " + " | ".join(f'"{n} {n * 7919}"' for n in range(3000)), "characters to print"),
])  # fmt: skip
def test_what_it_does_not_follow_is_told_at_once(
    grammar: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "MOST_PRINTED", 1 << 15 if "print" in why else 1 << 18)
    of = compiled(grammar)
    began = time.process_time()
    with pytest.raises(NotFollowed, match=why):
        made(of)
    assert time.process_time() - began < 5
    assert Automaton.of(of, TEXTS, frozenset({STOP})) is None


@pytest.mark.parametrize("line", [
    "0: [Token(5)->1]", "0: ['a'->1, EOS->2]", "0: ['\\q'->1]", "Rule 1: x, FSM: none", "0 ['a'->1",
])  # fmt: skip
def test_what_is_printed_otherwise_is_not_followed(line: str) -> None:
    first = "Rule 0: root, FSM: CompactFSM(num_states=2, start=0, end=[1], edges=["
    Rules.read(f"{first}\n0: ['a'->1]\n1: []\n])\n")
    with pytest.raises(NotFollowed):
        Rules.read(f"{first}\n{line}\n1: []\n])\n")


def test_texts_whose_states_never_come_again_are_given_up() -> None:
    """Each byte is deeper; or places are more with each; and that takes no longer than filling."""
    for grammar in (
        'root ::= "a" root "b" | "b"', 'root ::= e\ne ::= "a" | "a" e e',
        "root ::= x{0,1500}\nx ::= " + " | ".join(f'"a" [a{n}]' for n in range(1, 9)),
    ):  # fmt: skip
        follower = made(compiled(grammar))
        state: State | None = follower.start
        began, tokens = time.process_time(), 0
        while state is not None:
            state, tokens = follower.walk(state, TEXTS.index(b"aaa")), tokens + 1
        assert not follower.followed
        assert follower._looked < automaton.TRIED + automaton.WORTH * tokens + 3 * (
            automaton.MOST_LOOKED_AT + automaton.FIND)  # fmt: skip
        assert time.process_time() - began < 5
        assert tokens < 2000


def test_states_with_many_edges_are_given_up_sooner() -> None:
    """Each of them is compared with a byte that comes."""
    some = "[02468ACEGIKMOQSUWYacegikmoqsuwy]"
    rules = [f'r{n} ::= {some} r{(7 * n + 1) % 90} "{n % 10}" | {some}' for n in range(90)]
    root = "root ::= " + " | ".join(f'r{n} "{n}"' for n in range(90))
    follower = made(compiled("\n".join((root, *rules))))
    state, compared = follower.start, 0
    while follower.followed:
        compared += sum(len(follower._rules.ranges[place]) for place, _ in state.places)
        state = follower.walk(state, ord("2")) or follower.start
    assert compared < automaton.EDGES * follower._looked


def test_there_are_so_many_states_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds on to them: other states, the first one, or a text."""
    monkeypatch.setattr(automaton, "MOST_KEPT", 500)
    grammar = compiled(GRAMMARS[5])
    follower, chance = made(grammar), random.Random(0)
    first = follower.num_bytes
    for _ in range(12):
        pair, work = Pair(grammar, follower), [follower.start]
        for _ in range(30):
            pair.take(chance.choice(sorted(pair.allowed() - {STOP})))
            work.append(pair.state)  # type: ignore[arg-type]
        known = set()
        while work:
            if (state := work.pop()) not in known:
                known.add(state)
                work += filter(None, state.after.values())
        assert len({*known, *follower._states.values()}) < 31 + 25
        assert len(follower._callers) < 25
        assert first < follower.num_bytes < first + 40 * 700
    assert follower._looked > 20 * 500


def test_what_is_known_behind_tokens_is_bounded_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammar, taken, sizes = compiled(GRAMMARS[0]), [], []
    for most in (0, 3):
        monkeypatch.setattr(automaton, "MOST_BEHIND", most)
        follower = made(grammar)
        first = follower.num_bytes
        states = {follower.start}
        for _ in range(4):
            after = [(follower.walk(each, token), follower.walk(each, token))
                     for each in states for token in range(STOP)]  # fmt: skip
            assert all(once is again for once, again in after)
            states |= {once for once, _ in after if once is not None}
        assert sum(len(each.behind) for each in states) == most
        taken.append(len(states))
        sizes.append(follower.num_bytes)
        follower._forget()
        assert not any(each.behind for each in states)
        assert follower.num_bytes <= first
    assert taken[0] == taken[1] > 1
    assert sizes[1] - sizes[0] == 3 * automaton.BEHIND_BYTES


@pytest.mark.parametrize(("least", "most"), [(2, 140), (0, 133), (130, 131)])
def test_what_is_counted_is_counted_to_its_end(least: int, most: int) -> None:
    follower = made(compiled(f'root ::= x{{{least},{most}}} "z"\nx ::= "a" | "bc"'))
    state: State | None = follower.start
    ends = []
    while state is not None:
        ends.append(follower.walk(state, ord("z")) is not None)
        state = follower.walk(state, ord("a"))
    assert ends == [least <= count <= most for count in range(most + 1)]


@pytest.mark.parametrize("least", [0, 2, 3])
def test_repetitions_that_are_printed(least: int) -> None:
    follower = Automaton(Rules.read(
        "Rule 0: root, FSM: CompactFSM(num_states=4, start=0, end=[1], edges=[\n"
        f"0: [Repeat(rule=1, min={least}, max=3)->1]\n1: []\n])\n"
        "Rule 1: x, FSM: CompactFSM(num_states=4, start=2, end=[3], edges=[\n"
        "2: ['a'->3]\n3: []\n])"
    ), TEXTS, frozenset({STOP}))  # fmt: skip
    state: State | None = follower.start
    ends = []
    while state is not None:
        ends.append(state.complete)
        state = follower.walk(state, ord("a"))
    assert ends == [least <= count <= 3 for count in range(4)]
