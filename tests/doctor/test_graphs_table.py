"""The matrix in a terminal: what is printed is true, and a narrow terminal holds it."""

from __future__ import annotations

import re

import pytest

from reprise.cli.doctor.graphs_table import _cell, show
from reprise.doctor import timing
from reprise.doctor.graphs.measure import _share_eager_times
from reprise.doctor.graphs.report import GraphMatrix, MatrixCell

CONTEXTS = [1, 64, 512, 2048, 8192, 32768, 131072]


def matrix() -> GraphMatrix:
    """Two executors, whose eager times differ as they do on a busy machine."""
    made = GraphMatrix({"model": "m"}, ["none", "full", "breakable"],
                       {"decode": [1, 64], "mixed": []}, CONTEXTS)  # fmt: skip
    for executor, beside in (("none", 900.0), ("full", 1200.0), ("breakable", 1000.0)):
        for bucket in (1, 64):
            for context in CONTEXTS:
                cell = MatrixCell(executor, "decode", bucket, context, eager_ms=beside)
                if executor != "none":
                    cell.captured = cell.verified = True
                    cell.replay_ms, cell.sure = 100.0, True
                made.cells.append(cell)
    _share_eager_times(made)
    return made


def test_a_ratio_is_that_of_the_times_which_are_shown(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    show(matrix())
    eager, *graphs = (each for each in capsys.readouterr().out.splitlines() if " 1  " in each)
    (taken,) = set(re.findall(r"([\d.]+) ms", eager))
    for line in graphs:
        for replay, ratio in re.findall(r"([\d.]+) ms ([\d.]+)\u00d7", line):
            assert float(taken) / float(replay) == pytest.approx(float(ratio), abs=0.5)
    assert len(graphs) == 2


def test_eighty_columns_hold_it(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    show(matrix())
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for context in ("1", "64", "512", "2K", "8K", "32K", "128K"):
        assert re.search(rf"\b{context} tokens", out), context
    assert out.count("100.00 ms 11\u00d7") == 2 * 2 * len(CONTEXTS)


def test_noise_is_not_coloured():
    def style(eager: float, replay: float, sure: bool) -> str:
        cell = MatrixCell("full", "decode", 1, 1, eager_ms=eager, replay_ms=replay, sure=sure)
        return str(_cell(cell).spans[0].style)

    assert style(2.0, 1.0, True) == "cyan"
    assert style(1.0, 2.0, True) == "yellow"
    assert style(2.0, 1.0, False) == style(1.0, 2.0, False) == style(1.02, 1.0, True) == "dim"


@pytest.mark.parametrize(
    ("ones", "others", "sure"),
    [
        ([5, 5, 9, 5, 5], [3, 3, 4, 3, 3], True),
        ([3, 3, 4, 3, 3], [5, 5, 9, 5, 5], True),
        ([5, 5, 3, 5, 5], [3, 3, 4, 3, 3], False),
        ([900], [100], False),
    ],
)
def test_every_turn_must_agree(monkeypatch, ones, others, sure):
    monkeypatch.setattr(timing, "_turns_ms", lambda *_: [ones, others])
    found = timing.compare_ms(None, lambda: None, lambda: None)  # type: ignore[arg-type]
    assert found[2] is sure
