"""Requests with grammars in the matrix: every disturbance of :mod:`matrix` leaves them their
tokens, and a fault of the masks does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import matrix
import numpy as np
import pytest
from helpers import TinyModels, text_model, token_ids

from reprise import StructuredOutputsParams
from reprise.engine.structured import Grammars
from reprise.engine.structured.automaton import Automaton
from reprise.engine.structured.grammar import Grammar
from reprise.errors import GrammarError

pytest.importorskip("xgrammar")

WANTED: list[dict[str, Any] | None] = [
    {"regex": "([a-h]{2} ){5}[0-9]{6}"},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
              "required": ["a", "b"]}, "disable_any_whitespace": True},
    None,
]  # fmt: skip
"""In turn; requests without a grammar stand between."""
FAULTY = matrix.Features("none", "plain", 3)
SHORT = {
    FAULTY: ["neighbours", "preemption"],
    matrix.Features("full", "windows", 3, drafter="draft_model"): ["abort"],
}
PRODUCT = [
    *SHORT,
    *(
        matrix.Features(executor, model, drafts)
        for executor in matrix.EXECUTORS
        for model in ("plain", "windows", matrix.HYBRID, "experts")
        for drafts in (0, 3)
    ),
]
CASES = [
    *(pytest.param(*each, id=f"{each[0]}, few") for each in SHORT.items()),
    *(
        pytest.param(each, list(matrix.DISTURBANCES), id=str(each), marks=pytest.mark.long)
        for each in dict.fromkeys(PRODUCT)
    ),
]


def subjects() -> list[matrix.Subject]:
    """Those of the matrix, with grammars."""
    found = []
    for number, (_, params) in enumerate(matrix.SUBJECTS):
        what = WANTED[(number + number // len(WANTED)) % len(WANTED)]
        if what is not None:
            params = replace(params, structured_outputs=StructuredOutputsParams(**what))
        found.append((matrix.SUBJECTS[number][0], params))
    return found


class Known:
    """Cases, and what each subject gets alone."""

    def __init__(self, tiny: TinyModels, device: str) -> None:
        self._tiny, self._device = tiny, device
        self._alone = matrix.Alone(tiny, device)
        self._tokens: dict[str, list[list[int]]] = {}

    def case(self, features: matrix.Features) -> matrix.Case:
        kind = matrix.ARCHITECTURES.get(features.model, "qwen3")
        model = text_model(self._tiny, kind, **matrix.MODELS[features.model])
        return replace(self._alone.case(features, model), subjects=subjects())

    def tokens(self, features: matrix.Features) -> list[list[int]]:
        if features.model not in self._tokens:
            model = self.case(features).model
            self._tokens[features.model] = matrix.alone(model, self._device, subjects())
        return self._tokens[features.model]


@pytest.fixture(scope="module")
def known(tiny: TinyModels, device: str) -> Known:
    return Known(tiny, device)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("features", "disturbances"), CASES)
def test_same_tokens(known: Known, features: matrix.Features, disturbances: list[str]) -> None:
    assert not known.case(features).different(known.tokens(features), disturbances)


def test_a_limit_before_the_end_of_a_grammar_takes_no_token_away(known: Known) -> None:
    """Drafts bring both in one step: the last token of the limit, and what ends the text."""
    case = known.case(FAULTY)
    prompt, params = case.subjects[0]
    llm = case.engine()

    def ask(most: int) -> tuple[list[int], str | None]:
        asked = replace(params, max_tokens=most)
        (found,) = llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        return list(found.outputs[0].token_ids), found.outputs[0].finish_reason

    whole, reason = ask(40)
    assert reason == "stop"
    for most in range(1, len(whole)):
        assert ask(most) == (whole[:most], "length")


# ---- faults --------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def _changed(change: Callable[[Any, list[Any]], None]) -> Plant:
    """Masks of each step are changed; ``change`` has those of the steps before."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        made, before = Grammars.masks, []  # type: ignore[var-annotated]

        def masks(self: Any, *arguments: Any) -> Any:
            found = made(self, *arguments)
            if found is not None:
                right = found.which.copy()
                change(found, before)
                before.append(right)
            return found

        patch.setattr(Grammars, "masks", masks)

    return plant


def _of_the_step_before(found: Any, before: list[Any]) -> None:
    if before and before[-1].shape == found.which.shape:
        found.which = before[-1]


def _of_another_row(found: Any, _: list[Any]) -> None:
    masked = found.which >= 0
    found.which[masked] = np.roll(found.which[masked], 1)


def _of_rows_that_follow(found: Any, _: list[Any]) -> None:
    masked = found.which >= 0
    found.which[masked] = found.which[masked][0]


def _lost(found: Any, _: list[Any]) -> None:
    found.words = [(begin, np.full_like(words, -1)) for begin, words in found.words]


def _not_sent(found: Any, before: list[Any]) -> None:
    if before:
        found.words = []


def _too_narrow(found: Any, _: list[Any]) -> None:
    """The lowest token of each mask that has others is forbidden: every text still matches."""
    found.words = [(begin, words.copy()) for begin, words in found.words]
    for row in (row for _, words in found.words for row in words.view(np.uint32)):
        bits = [(word, bit) for word in np.flatnonzero(row) for bit in range(32)
                if row[word] >> np.uint32(bit) & 1]  # fmt: skip
        if len(bits) > 1:
            row[bits[0][0]] &= ~np.uint32(1 << bits[0][1])


def _all_states_are_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Automaton, "walk", lambda self, state, token: self.start)


def _drafts_are_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Grammar, "_take_back", lambda self, known: None)


FAULTS: dict[str, Plant] = {
    "of the step before": _changed(_of_the_step_before),
    "of another row": _changed(_of_another_row),
    "of rows that follow": _changed(_of_rows_that_follow),
    "lost": _changed(_lost),
    "not sent": _changed(_not_sent),
    "all states are one": _all_states_are_one,
    "too narrow": _changed(_too_narrow),
    "drafts are not taken back": _drafts_are_not_taken_back,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_masks_is_noticed(
    known: Known, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an error of those who have a grammar, or by their tokens; of others by neither."""
    expected = known.tokens(FAULTY)
    FAULTS[fault](monkeypatch)
    try:
        found = matrix.neighbours(known.case(FAULTY))
    except GrammarError as error:
        found = error.outputs
        ended = [each.outputs[0].finish_reason == "error" for each in found]
        assert any(ended)
        found = [found[place] for place in sorted(range(len(found)), key=_order(found))]
    tokens = token_ids(found)
    assert tokens != expected
    for (_, params), got, wanted in zip(subjects(), tokens, expected, strict=True):
        if params.structured_outputs is None:
            assert got == wanted


def _order(outputs: list[Any]) -> Callable[[int], int]:
    """Subjects are submitted in reverse."""
    return lambda place: len(outputs) - place


def test_the_subjects_are_of_both_kinds() -> None:
    kinds = {(number // 3, params.structured_outputs is None)
             for number, (_, params) in enumerate(subjects())}  # fmt: skip
    assert len(kinds) == 8  # for each prompt
