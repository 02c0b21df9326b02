"""Fixtures of the command-line tests: commands run in this process unless a test needs its own."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Iterator[Invoke]:
    """Run ``reprise ARGUMENTS``; leaves the process's logging as it was."""
    from reprise.cli.app import app

    names = ("reprise", "py.warnings")
    before = {
        name: (logging.getLogger(name).handlers, logging.getLogger(name).level) for name in names
    }

    def run(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(app, list(arguments), prog_name="reprise", **options)

    yield run
    logging.captureWarnings(False)
    for name, (handlers, level) in before.items():
        logging.getLogger(name).handlers = handlers
        logging.getLogger(name).setLevel(level)


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
        )
        started.append(process)
        return process

    yield start
    for each in started:
        if each.poll() is None:
            each.kill()
        each.communicate()
