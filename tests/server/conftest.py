"""Servers as processes: a real one with the demo model, and ones whose engine is a stub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest
from http_server import Server, Start
from warm import SERVE_WITH


@pytest.fixture(scope="session")
def server(device: str) -> Iterator[Server]:
    """The demo model."""
    found = Server(
        ["-m", "reprise", "serve", "--port", "0", "--device", device, "--num-blocks", "400"]
    )
    yield found
    found.close()


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start servers whose engine is another program: by default the stub."""
    with contextlib.ExitStack() as stack:

        def run(
            *options: str, engine: Sequence[str] = ("-m", "reprise.testing.stub_engine")
        ) -> Server:
            found = Server([SERVE_WITH, " ".join(engine), "--port", "0", *options])
            stack.callback(found.close)
            return found

        yield run


@pytest.fixture(scope="module")
def stub(start: Start) -> Server:
    return start("--access-log")
