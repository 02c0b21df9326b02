"""An HTTP process that reads nothing, beside one that reads."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from reprise.config import EngineConfig
from reprise.server import wire
from reprise.server.engine_server import EngineServer

TOKENS = 100
PARAMS = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "output_kind": "DELTA"}
STREAM = wire.Generate(1, "name", {"prompt": "Once upon a time"}, None, PARAMS, 0, [])


def connect(server: EngineServer) -> tuple[socket.socket, Iterator[Any]]:
    """An HTTP process's side, and the messages that come."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that there is
    ours.settimeout(30)
    server.connect(theirs)

    def messages() -> Iterator[Any]:
        frames = wire.Frames()
        while True:
            received = ours.recv(1 << 16)
            assert received
            yield from frames.feed(received)

    found = messages()
    assert isinstance(next(found), wire.Hello)
    return ours, found


def stream(messages: Iterator[Any]) -> list[list[Any]]:
    """The outputs of a request, to its end."""
    outputs: list[list[Any]] = []
    for message in messages:
        for _, new, end, _ in message.items if isinstance(message, wire.Deltas) else ():
            outputs += new
            if end is not None:
                return outputs
    raise AssertionError("the messages have ended")


def test_a_process_that_reads_nothing_costs_nobody_and_misses_nothing(device: str) -> None:
    server = EngineServer(EngineConfig(device=device, num_blocks=100), None)
    serving = threading.Thread(target=server.run, daemon=True)
    serving.start()
    try:
        idle, news_of_idle = connect(server)
        busy, news_of_busy = connect(server)
        with idle, busy:
            idle.sendall(wire.frame(STREAM))
            busy.sendall(wire.frame(STREAM))
            expected = stream(news_of_busy)
            # The engine has come to the end of the other one too, of which nothing was read.
            deadline, load = time.monotonic() + 30, None
            while load != 0 and time.monotonic() < deadline:
                busy.sendall(wire.frame(wire.Call(2, "load", {})))
                load = next(news_of_busy).result
            assert load == 0
            found = stream(news_of_idle)
            # Deltas gather: the last one has all that found no room.
            assert len(found) < TOKENS / 2
            assert found[-1][2] > TOKENS / 2
            assert sum(each[2] for each in found) == TOKENS
            assert "".join(each[1] for each in found) == "".join(each[1] for each in expected)
    finally:
        server.stop()
        serving.join(30)
    assert not serving.is_alive()
