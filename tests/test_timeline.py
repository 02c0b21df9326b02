"""Spans of a start add up."""

from __future__ import annotations

import time

import pytest

from reprise import timeline


def test_spans_are_kept_in_order_and_add_up():
    with timeline.recording() as seconds:
        began = time.perf_counter()
        with timeline.span("outer"):
            time.sleep(0.02)
            with timeline.span("inner"):
                time.sleep(0.03)
        with timeline.span("outer"):
            time.sleep(0.01)
        elapsed = time.perf_counter() - began
    assert list(seconds) == ["inner", "outer"]
    assert seconds["inner"] >= 0.03
    assert sum(seconds.values()) == pytest.approx(elapsed, abs=0.005)


def test_without_a_recording_a_span_costs_nothing_and_fails_as_its_block_does():
    with pytest.raises(KeyError), timeline.span("unheard"):
        raise KeyError
    with timeline.recording() as seconds:
        with pytest.raises(KeyError), timeline.span("failed"):
            raise KeyError
        with timeline.span("next"):
            pass
    assert set(seconds) == {"failed", "next"}
