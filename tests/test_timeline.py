"""Spans of a start add up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from reprise import timeline


def test_spans_are_kept_in_order_and_add_up(monkeypatch):
    now = 0.0
    monkeypatch.setattr(timeline, "time", SimpleNamespace(perf_counter=lambda: now))
    with timeline.recording() as seconds:
        with timeline.span("outer"):
            now += 2
            with timeline.span("inner"):
                now += 3
            now += 5
        now += 7
        with timeline.span("outer"):
            now += 11
    assert list(seconds.items()) == [("inner", 3), ("outer", 18)]


def test_without_a_recording_a_span_costs_nothing_and_fails_as_its_block_does():
    with pytest.raises(KeyError), timeline.span("unheard"):
        raise KeyError
    with timeline.recording() as seconds:
        with pytest.raises(KeyError), timeline.span("failed"):
            raise KeyError
        with timeline.span("next"):
            pass
    assert set(seconds) == {"failed", "next"}
