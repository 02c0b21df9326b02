"""Bars appear on a terminal, for work that takes long, and only where they are wanted."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from helpers import TinyModels, greedy, make_llm, random_ids

from reprise import progress as module
from reprise.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal, where any work takes long enough for a bar."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(module, "SHOW_AFTER_SECONDS", 0.0)
    terminal = Terminal()
    # Not in ``sys`` itself, where pytest puts its own when the test begins.
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=terminal))
    return terminal


def test_bar_with_a_total(stderr):
    with progress("counting", 3) as bar:
        bar.advance(2)
    assert "counting" in stderr.getvalue()
    assert "2/3" in stderr.getvalue()


def test_bar_whose_total_comes_later(stderr):
    with progress("counting", 0) as bar:
        bar.show("counting sheep", 4, 7)
    assert "counting sheep" in stderr.getvalue()
    assert "4/7" in stderr.getvalue()


def test_no_bar_if_not_wanted(stderr):
    with progress("counting", 3, visible=False) as bar:
        bar.advance()
        bar.show("counting sheep", 4, 7)
    assert stderr.getvalue() == ""
    assert bar.done == 4


def test_bar_at_once(stderr, monkeypatch):
    monkeypatch.setattr("reprise.progress.SHOW_AFTER_SECONDS", 60.0)
    with progress("waiting", 3, at_once=True):
        pass
    assert "0/3" in stderr.getvalue()


def test_no_bar_without_a_terminal(stderr, monkeypatch):
    monkeypatch.setattr(stderr, "isatty", lambda: False)
    with progress("counting", 3) as bar:
        bar.advance()
    assert stderr.getvalue() == ""


def test_no_bar_for_short_work(stderr, monkeypatch):
    now = 0.0
    monkeypatch.setattr(module, "SHOW_AFTER_SECONDS", 1.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    with progress("counting", 3) as bar:
        now = 0.9
        bar.advance()
        assert stderr.getvalue() == ""
        now = 1.1
        bar.advance()
    assert "2/3" in stderr.getvalue()


@pytest.mark.parametrize("use_tqdm", [True, False])
def test_generate_shows_a_bar_only_if_asked(use_tqdm, tiny: TinyModels, device, stderr):
    llm = make_llm(tiny(), device)
    # Whatever start-up has shown is not the matter.
    stderr.truncate(0)
    llm.generate([random_ids(0, 5), random_ids(1, 7)], greedy(3), use_tqdm=use_tqdm)
    assert ("generating, 6 tokens" in stderr.getvalue()) is use_tqdm
    assert bool(stderr.getvalue()) is use_tqdm
