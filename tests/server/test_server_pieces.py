"""How pieces of streams go out: connections and an engine that are made up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from reprise.server import wire
from reprise.server.app import create_app
from reprise.server.arrivals import Arrivals
from reprise.server.caller import Caller, Callers
from reprise.server.client import EngineClient
from reprise.server.generation import DONE, Reply
from reprise.server.options import ServerOptions
from reprise.server.protocol import Connection, Outbox
from reprise.server.streaming import _Pump


class Texts(Reply):
    def chunks(self, news: list[tuple[int, list[Any]]]) -> bytes:
        return b"".join(each[1].encode() for _, item in news for each in item[1])


class Transport:
    def __init__(self, closing: bool = False, error: Exception | None = None) -> None:
        self.closing, self.error = closing, error
        self.sent = b""

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.sent += data

    def abort(self) -> None:
        self.closing = True


def test_an_error_behind_a_text_that_is_held_back_is_told() -> None:
    """Both came before the stream waited for news, and nobody rings again."""

    async def run() -> bytes:
        client = EngineClient()
        client.facts, client._transport = {}, Transport()  # type: ignore[assignment]
        sent: list[bytes] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message["body"])

        cycle: Any = SimpleNamespace(
            send=send, transport=Transport(),
            flow=SimpleNamespace(write_paused=False, resume_reading=lambda: None),
        )  # fmt: skip
        connection = Connection(cycle, Outbox(), Arrivals())
        caller = Caller(client, Callers(), connection)
        caller.ask([{"name": "a", "prompt": None, "chat": None, "params": {}, "priority": 0,
                     "wants": []}])  # fmt: skip
        client.data_received(wire.frame(wire.Deltas([[1, "", 1]])))
        client.data_received(wire.frame(wire.Refused(1, "RuntimeError", "it failed")))
        pump = _Pump(caller, Texts(), None, connection)
        await asyncio.wait_for(pump.run(), 60)
        caller.close()
        return b"".join(sent)

    told = asyncio.run(run())
    assert b"error" in told
    assert told.endswith(DONE)


def test_a_connection_that_cannot_be_written_to_costs_the_others_nothing() -> None:
    async def run() -> None:
        bad, good, outbox = Transport(error=RuntimeError("closed")), Transport(), Outbox()
        for each in (bad, good):
            outbox.put(each, b"x")  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert (bad.closing, good.sent) == (True, b"x")

    asyncio.run(run())


def test_where_a_client_has_sent_its_last_byte_a_stream_waits_for_it() -> None:
    """Behind what it does not read pieces would be made for nobody, and nobody would notice."""
    flow = SimpleNamespace(write_paused=False)
    for closing in (False, True):
        cycle: Any = SimpleNamespace(transport=Transport(closing), flow=flow)
        assert Connection(cycle, Outbox(), Arrivals()).full is closing


@pytest.mark.parametrize("asked", ["GET /v1/models", "GET /v1/responses/a", "POST /v1/completions"])
def test_a_fault_of_ours_is_an_error_as_all_others(asked: str) -> None:
    """On every kind of route: the client parses it, and finds under which name the log has it."""
    # Nothing that an endpoint asks of such a state is there.
    state: Any = SimpleNamespace(options=ServerOptions())
    method, path = asked.split()

    async def run() -> httpx.Response:
        there = httpx.ASGITransport(create_app(state, feed=None), raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=there, base_url="http://x") as client:
            return await client.request(method, path, headers={"x-request-id": "mine"}, json={})

    found = asyncio.run(run())
    assert found.status_code == 500
    assert found.json()["error"]["type"] == "server_error"
    assert "under mine" in found.json()["error"]["message"]
    assert "SimpleNamespace" not in found.text


def test_a_path_that_a_proxy_strips_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    state: Any = SimpleNamespace(options=ServerOptions(root_path="/stripped"))
    app = create_app(state, feed=None)  # type: ignore[arg-type]
    assert not recwarn.list

    async def schema() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return (await client.get("http://there/openapi.json")).json()

    assert asyncio.run(schema())["servers"] == [{"url": "/stripped"}]
