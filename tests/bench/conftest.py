"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quick_floor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests are about what stands beside the floor: on the CPU a rough one does, measured in
    no time. Those marked ``floor`` get the true one."""
    if request.config.getoption("--device") != "cpu" or request.node.get_closest_marker("floor"):
        return
    from reprise.bench import floor

    monkeypatch.setattr(floor, "LEAST_COPY_BYTES", 1 << 22)
    monkeypatch.setattr(floor, "LONG_COPY_SECONDS", 0.0)
    monkeypatch.setattr(floor, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(floor, "LARGEST_PRODUCT", 512)
