"""An HTTP process keeps nothing of a request that is over, however it ended."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from reprise.processes.child import Child
from reprise.processes.control import Control
from reprise.server.client import EngineClient
from reprise.server.options import ServerOptions
from reprise.server.worker import Worker

SECONDS = 60
"""Until what has ended is gone; a moment is enough, unless it never is."""
ROUNDS = 12
LIMITS = [None, None, 0]
OURS = ("reprise.server.", "uvicorn.", "starlette.", "_asyncio", "uvloop.")
"""Modules of what a request is made of."""
BAD = '{"messages": [{"role": "user"'


def _body(**fields: Any) -> str:
    return json.dumps(fields)


def _orders(**orders: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": json.dumps(orders)}]}


CHAT, COMPLETE, RESPOND = "/v1/chat/completions", "/v1/completions", "/v1/responses"
THINKS = {"pieces": ["<think>", "a", "</think>", "b"]}
CALL = {"pieces": ['<tool_call>{"name": "f", "arguments": {}}</tool_call>']}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
REQUESTS: list[tuple[str, str, int | None]] = [
    (COMPLETE, _body(prompt="x", max_tokens=5), None),
    (COMPLETE, _body(prompt="x", max_tokens=5, stream=True, n=2), None),
    (COMPLETE, _body(prompt=["x", "y"], max_tokens=1), None),
    (COMPLETE, _body(prompt="x", temperature="hot"), None),
    (COMPLETE, _body(prompt="x", max_tokens=1, nobody_knows=1), None),
    (CHAT, _body(**_orders(**THINKS)), None),
    (CHAT, _body(**_orders(**THINKS), stream=True), None),
    (CHAT, _body(**_orders(**CALL), tools=TOOLS, stream=True), None),
    (CHAT, _body(**_orders(fail=1)), None),
    (CHAT, _body(**_orders(fail=1), stream=True), None),
    (CHAT, BAD, None),
    (CHAT, _body(**_orders(wait=True)), 0),
    (CHAT, _body(**_orders(repeat=["x", 1, 900]), stream=True), 100),
    (RESPOND, _body(input=json.dumps(THINKS)), None),
    (RESPOND, _body(input=json.dumps(THINKS), stream=True), None),
    (RESPOND, _body(input=json.dumps({"wait": True}), stream=True), 100),
    (RESPOND, _body(input="x", previous_response_id="resp_x"), None),
    ("/nowhere", "{}", None),
    ("/tokenize", _body(prompt="x"), None),
    ("/abort", _body(request_id="x"), None),
]
"""Path, body, and how many bytes of the reply are read before the client leaves; None: all."""


async def _ask(port: int, path: str, body: str, read: int | None) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
    if read is None:
        assert (await reader.read()).startswith(b"HTTP/1.1 ")
    else:
        await writer.drain()
        await reader.read(read) if read else None
        writer.transport.abort()
    writer.close()


def _alive() -> Counter[str]:
    gc.collect()
    kinds = (type(each) for each in gc.get_objects())
    return Counter(
        f"{each.__module__}.{each.__qualname__}"
        for each in kinds
        if str(each.__module__).startswith(OURS)
    )


@pytest.fixture
def engine() -> Iterator[socket.socket]:
    """A connection to a stub."""
    stub = Child("a stub", ("-m", "reprise.testing.stub_engine"), json.dumps({"limits": LIMITS}))
    ours, theirs = socket.socketpair()
    stub.control.send_file(Control.CONNECTION, theirs.fileno())
    theirs.close()
    ours.setblocking(False)
    yield ours
    stub.stop()
    stub.end(SECONDS)


def test_nothing_is_left_of_a_request(engine: socket.socket) -> None:
    asyncio.run(_serve_and_count(engine))


async def _serve_and_count(engine: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    _, client = await loop.create_unix_connection(EngineClient, sock=engine)
    await client.ready.wait()
    worker = Worker(ServerOptions(tool_call_parser="hermes", api_server_count=1), client)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    serving = asyncio.create_task(worker.run(listener))
    for _ in range(2):
        for request in REQUESTS:
            await _ask(port, *request)
    before = await _settled(None)
    for _ in range(ROUNDS):
        await asyncio.gather(*(_ask(port, *request) for request in REQUESTS))
    await _settled(before)
    worker.stop()
    await serving


async def _settled(expected: Counter[str] | None) -> Counter[str]:
    """What is alive when nothing changes any more, which is no more than expected."""
    end = asyncio.get_running_loop().time() + SECONDS
    last: Counter[str] = Counter()
    while True:
        await asyncio.sleep(0.1)
        found = _alive()
        if found == last and (expected is None or not found - expected):
            return found
        assert asyncio.get_running_loop().time() < end, found - (expected or Counter())
        last = found
