"""Fixtures of the doctor's tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import install_package
from typer.testing import CliRunner, Result

BROKEN = Path(__file__).parents[1] / "broken_platform"


@pytest.fixture
def invoke() -> Iterator[Callable[..., Result]]:
    """Run ``reprise ARGUMENTS``; leaves the process's logging as it was."""
    from reprise.cli.app import app

    names = ("reprise", "py.warnings")
    loggers = [logging.getLogger(each) for each in names]
    before = [(each.handlers, each.level) for each in loggers]

    def run(*arguments: str, **options: Any) -> Result:
        options.setdefault("env", {"COLUMNS": "180"})
        return CliRunner().invoke(app, list(arguments), prog_name="reprise", **options)

    yield run
    logging.captureWarnings(False)
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers = handlers
        logger.setLevel(level)


@pytest.fixture
def broken_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of broken platforms, as pip would leave it."""
    install_package(BROKEN, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
