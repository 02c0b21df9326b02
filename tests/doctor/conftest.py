"""Fixtures of the doctor's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import install_package
from typer.testing import CliRunner, Result

BROKEN = Path(__file__).parents[1] / "broken_platform"


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Run ``reprise ARGUMENTS``."""
    from reprise.cli.app import app

    def run(*arguments: str, **options: Any) -> Result:
        options.setdefault("env", {"COLUMNS": "180"})
        return CliRunner().invoke(app, list(arguments), prog_name="reprise", **options)

    return run


@pytest.fixture
def broken_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of broken platforms, as pip would leave it."""
    install_package(BROKEN, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
