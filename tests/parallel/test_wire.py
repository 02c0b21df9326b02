"""Steps as bytes: what goes in comes out, and a step like the last one is small."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprise.cache.request_table import Copy
from reprise.errors import RanksError
from reprise.parallel.messages import Kind, pack, unpack
from reprise.parallel.wire import Decoder, Encoder
from reprise.sampling_params import SamplingParams
from reprise.step import Admission, Step, TableEdit


def plain(value: Any) -> Any:
    """Steps by their content: they compare by identity."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def merged(step: Step) -> Any:
    """Edits of a row that adjoin are one."""
    found = []
    for edits in step.edits:
        mine: list[TableEdit] = []
        for each in edits:
            last = mine[-1] if mine else None
            if last and last.row == each.row and last.begin + len(last.blocks) == each.begin:
                mine[-1] = TableEdit(each.row, last.begin, [*last.blocks, *each.blocks])
            else:
                mine.append(TableEdit(each.row, each.begin, list(each.blocks)))
        found.append(plain(mine))
    return {**plain(step), "edits": found}


rows = st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True)


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    """Some of them go on as the one before, and tables grow in order or anywhere."""
    found: list[Step] = []
    lifetimes = draw(st.integers(1, 3))
    ends: dict[tuple[int, int], int] = {}
    for index in range(draw(st.integers(1, 6))):
        if found and draw(st.booleans()):
            last = found[-1]
            mine, counts, drafts = last.rows, last.counts, last.drafts
            samples, admitted = last.samples, []
        else:
            mine = draw(rows)
            counts = [draw(st.integers(1, 5)) for _ in mine]
            drafts = [draw(st.integers(0, 7)) for _ in mine]
            samples = [draw(st.booleans()) for _ in mine]
            admitted = [
                Admission(
                    row, f"r{row}", 0, [1, 2, row], 3, 20, SamplingParams(), -row, frozenset()
                )
                for row in mine
                if index == 0 or draw(st.booleans())
            ]
        for each in admitted:
            for lifetime in range(lifetimes):
                ends.pop((lifetime, each.row), None)
        edits = []
        for lifetime in range(lifetimes):
            of_this = []
            for row in mine:
                if draw(st.booleans()):
                    begin = ends.get((lifetime, row), 0)
                    begin = begin if draw(st.booleans()) else draw(st.integers(0, 9))
                    blocks = draw(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=3))
                    ends[lifetime, row] = max(ends.get((lifetime, row), 0), begin + len(blocks))
                    of_this.append(TableEdit(row, begin, blocks))
            edits.append(of_this)
        copies = [Copy(0, 3, 4)] if draw(st.booleans()) else []
        found.append(
            Step(
                index, mine, counts, drafts, samples, draw(st.integers(0, len(mine))),
                sum(counts) + sum(drafts), admitted, edits, draw(rows), copies,
                draw(st.none() | st.integers(0, 7)), draw(st.booleans()),
            )
        )  # fmt: skip
    return found


@given(steps())
def test_what_goes_in_comes_out(some: list[Step]) -> None:
    encoder, decoder = Encoder(), Decoder()
    for each in some:
        assert merged(decoder.decode(encoder.encode(each))) == merged(each)


def test_a_step_like_the_last_one_is_small() -> None:
    """At most 128 bytes, and six for each new block, whatever the number of requests."""
    encoder = Encoder()
    every = list(range(1, 257))
    admitted = [
        Admission(row, f"{row}", 0, [1] * 50, 50, 99, SamplingParams(), row, frozenset())
        for row in every
    ]
    first = [TableEdit(row, 0, [row]) for row in every]
    ones, none = [1] * 256, [0] * 256
    encoder.encode(Step(0, every, ones, none, [True] * 256, 256, 256, admitted, [first]))
    for index, count in ((1, 0), (2, 16), (3, 256)):
        begin = 1 if index < 3 else 2
        edits = [TableEdit(row, begin, [row]) for row in every[:count]]
        if index == 3:
            edits = [TableEdit(row, 2 if row <= 16 else 1, [row]) for row in every]
        step = Step(index, every, ones, none, [True] * 256, 256, 256, edits=[edits])
        assert len(encoder.encode(step)) <= 128 + 6 * count


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RanksError, match="at most 65535"):
        Encoder().encode(Step(0, [70000], [1], [0], [True], 1, 1))


def test_a_message_out_of_order_is_no_message() -> None:
    """Whatever it says: a rank that has missed one would do other things than the others."""
    message = pack(Kind.SAMPLE, 7, 3, b"x")
    assert unpack(message, 7) == (Kind.SAMPLE, 3, b"x")
    for expected in (6, 8, 7 + (1 << 31)):
        with pytest.raises(RanksError, match=f"message {expected} .* was lost: number 7 came"):
            unpack(message, expected)
    wrapped = pack(Kind.STEP, (1 << 32) + 5, 0)
    assert unpack(wrapped, (1 << 32) + 5)[0] is Kind.STEP
