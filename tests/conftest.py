"""Fixtures shared by all tests. Tests name no device: they take the ``device`` fixture."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="platform to test on: cpu, cuda, xpu, ...")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        # Before triton is imported: its kernels then run under the interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """What the user would type after ``--device``."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def platform(device: str):
    """The platform under test."""
    from reprise import platforms

    found = platforms.resolve(device)
    found.activate()
    return found
