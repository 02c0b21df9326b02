"""Fixtures of the command-line tests: commands run in this process unless a test needs its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result
from warm import end_with_parent

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Run ``reprise ARGUMENTS``."""
    from reprise.cli.app import app

    def run(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(app, list(arguments), prog_name="reprise", **options)

    return run


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start ``reprise ARGUMENTS`` as a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "reprise", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_parent,
        )
        started.append(process)
        return process

    yield start
    for each in started:
        if each.poll() is None:
            each.kill()
        each.communicate()
