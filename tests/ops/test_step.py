"""From rows to a step's inputs and back, against loops over requests and tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from reprise.ops import advance, lay_out
from reprise.ops.step import ACCEPTED, COMPUTED, LIMIT, NEXT, PROMPT
from reprise.platforms import Platform

ROWS, COLUMNS = 7, 9
SIZES = (4, 2)
Numbers = list[list[int]]


@dataclass
class Part:
    """One request's share of a step; of padding row 0."""

    row: int
    known: list[int]
    """Ids of a chunk; none for a decode."""
    query_len: int


def numbers_of(data: st.DataObject, drafts: int) -> Numbers:
    numbers = [[0] * ROWS for _ in range(NEXT + 1 + drafts)]
    for row in range(1, ROWS):
        numbers[LIMIT][row] = data.draw(st.integers(2, 16))
        numbers[PROMPT][row] = data.draw(st.integers(1, numbers[LIMIT][row]))
        numbers[COMPUTED][row] = data.draw(st.integers(0, numbers[LIMIT][row]))
        numbers[ACCEPTED][row] = data.draw(st.integers(0, 1 + drafts))
        for each in range(NEXT, NEXT + 1 + drafts):
            numbers[each][row] = data.draw(st.integers(-1 if each > NEXT else 0, 3))
    return numbers


def parts_of(data: st.DataObject, numbers: Numbers, drafts: int, decode: bool) -> list[Part]:
    rows = data.draw(st.permutations(range(1, ROWS)))[: data.draw(st.integers(1, ROWS - 1))]
    parts = []
    for row in rows:
        left = numbers[LIMIT][row] - numbers[COMPUTED][row]
        if decode or left == 0 or data.draw(st.booleans()):
            parts.append(Part(row, [], 1 + drafts))
        else:
            count = data.draw(st.integers(1, left))
            parts.append(Part(row, [100 + each for each in range(count)], count))
    return parts


def on(platform: Platform, values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=platform.device)


RUNS = settings(max_examples=30)
IMPLEMENTATIONS = pytest.mark.parametrize("name", list(lay_out.implementations))


@IMPLEMENTATIONS
@RUNS
@given(data=st.data())
def test_inputs_follow_from_rows(
    implementation: Callable[..., Any], platform: Platform, name: str, data: st.DataObject
) -> None:
    function = implementation(lay_out, name)
    drafts, decode = data.draw(st.sampled_from([0, 0, 1, 3])), data.draw(st.booleans())
    numbers = numbers_of(data, drafts)
    parts = parts_of(data, numbers, drafts, decode)
    padding = data.draw(st.integers(0, 3))
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.query_len)
    query_len = 1 + drafts if decode else 0
    tokens = starts[-1] + padding * (query_len or 2)
    starts += [starts[-1]] * padding
    rows = [part.row for part in parts] + [0] * padding
    blocks, null = st.permutations(range(1, 1 + COLUMNS)), [0] * COLUMNS
    tables = [[data.draw(blocks) if row else null for row in rows] for _ in SIZES]
    given_ids = [7] * tokens
    for part, start in zip(parts, starts, strict=False):
        given_ids[start : start + len(part.known)] = part.known

    ids, positions, draws, lengths = [], [], [], []
    slots: list[list[int]] = [[] for _ in SIZES]
    for index, part in enumerate(parts):
        computed, limit = numbers[COMPUTED][part.row], numbers[LIMIT][part.row]
        newest = [max(numbers[each][part.row], 0) for each in range(NEXT, len(numbers))]
        ids += part.known or newest
        for position in range(computed, computed + part.query_len):
            shown = min(position, limit - 1)
            positions.append(shown)
            draws.append(shown + 1 - numbers[PROMPT][part.row])
            for number, size in enumerate(SIZES):
                block = tables[number][index][shown // size]
                slots[number].append(block * size + shown % size if position < limit else 0)
        lengths.append(computed + part.query_len if computed < limit else 0)
    live, more = len(ids), tokens - len(ids)

    table = on(platform, tables, torch.int32)
    out: dict[str, torch.Tensor] = {
        "token_ids": on(platform, given_ids),
        "positions": on(platform, [-5] * tokens),
        "draws": on(platform, [-5] * tokens),
        "slots": on(platform, [[-5] * tokens for _ in SIZES]),
        "seq_lens": on(platform, [-5] * len(rows), torch.int32),
        "accepted": on(platform, [-5] * len(rows), torch.int32),
        "fresh": on(platform, [0] * len(rows), torch.bool),
    }
    arguments = (
        on(platform, numbers), on(platform, rows),
        on(platform, [len(part.known) for part in parts] + [0] * padding, torch.int32),
        on(platform, starts, torch.int32), table, on(platform, SIZES), *out.values(), query_len,
    )  # fmt: skip

    def check() -> None:
        assert out["token_ids"].tolist() == ids + [0] * more
        assert out["positions"].tolist() == positions + [0] * more
        assert out["draws"].tolist()[:live] == draws
        assert out["slots"].tolist() == [each + [0] * more for each in slots]
        assert out["seq_lens"].tolist() == lengths + [0] * padding
        assert out["accepted"].tolist() == [numbers[ACCEPTED][row] for row in rows]
        assert out["fresh"].tolist() == [numbers[COMPUTED][row] == 0 for row in rows]

    if hasattr(function, "bind"):
        again = function.bind(*arguments)
        check()
        for key in ("positions", "slots", "seq_lens"):
            out[key].fill_(-7)
        again()
    else:
        function(*arguments)
    check()


@IMPLEMENTATIONS
@RUNS
@given(data=st.data())
def test_drafts_count_as_long_as_they_are_what_is_drawn(
    implementation: Callable[..., Any], platform: Platform, name: str, data: st.DataObject
) -> None:
    function = implementation(advance, name)
    drafts, decode = data.draw(st.sampled_from([0, 0, 1, 3])), data.draw(st.booleans())
    numbers = numbers_of(data, drafts)
    parts = parts_of(data, numbers, drafts, decode)
    drawn: list[int] = []
    first, emitted = [0], []
    expected = [list(each) for each in numbers]
    for part in parts:
        there = 0 if part.known and data.draw(st.booleans()) else 1 if part.known else 1 + drafts
        mine = data.draw(st.lists(st.integers(0, 3), min_size=there, max_size=there))
        newest = [numbers[each][part.row] for each in range(NEXT, len(numbers))]
        count = 0
        while count < there and (count == 0 or newest[count] == mine[count - 1]):
            count += 1
        drawn += mine
        first.append(len(drawn))
        drafted = sum(draft >= 0 for draft in newest[1:there])
        emitted.append([*mine[:count], *([-1] * (1 + drafts - count)), drafted])
        forward = len(part.known) or count
        expected[COMPUTED][part.row] = min(
            numbers[COMPUTED][part.row] + forward, numbers[LIMIT][part.row]
        )
        expected[ACCEPTED][part.row] = 0 if part.known else count
        if count:
            expected[NEXT][part.row] = mine[count - 1]
        for each in range(NEXT + 1, len(numbers)):
            expected[each][part.row] = -1
    padding = data.draw(st.integers(0, 2))
    state, out = on(platform, numbers), on(platform, [[-7] * (2 + drafts)] * (len(parts) + padding))
    arguments = (
        state, on(platform, [part.row for part in parts] + [0] * padding),
        on(platform, [len(part.known) for part in parts] + [0] * padding, torch.int32),
        on(platform, first + [len(drawn)] * padding, torch.int32), out,
    )  # fmt: skip
    if hasattr(function, "bind"):
        again = function.bind(*arguments, on(platform, drawn))
        state.copy_(on(platform, numbers))  # as before another step of the same rows
        state[ACCEPTED] = on(platform, expected[ACCEPTED])
        out.fill_(-7)
        again(on(platform, drawn))
    else:
        function(*arguments, on(platform, drawn))
    assert state.tolist() == expected
    assert out.tolist() == emitted + [[*([-1] * (1 + drafts)), 0]] * padding
