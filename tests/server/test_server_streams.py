"""A stream whose client reads at times, and whose news comes at times: no text is lost, doubled or
out of order."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any, cast

import pytest

from reprise.server import wire
from reprise.server.caller import Caller, Callers
from reprise.server.client import EngineClient
from reprise.server.completions import Completion
from reprise.server.fields import CompletionRequest
from reprise.server.generation import DONE
from reprise.server.protocol import CONNECTION
from reprise.server.streaming import EventStream
from reprise.testing.stub_engine import FACTS

STEPS = 40


class Engine:
    """A transport to nobody."""

    def write(self, data: bytes) -> None: ...


class Client:
    """Takes all, or makes others wait. What is sent soon goes out with the loop's next turn."""

    def __init__(self) -> None:
        self.room = asyncio.Event()
        self.room.set()
        self.received: list[bytes] = []

    def when_lost(self, call: Any) -> None: ...

    def arrived(self) -> bool:
        return False

    @property
    def full(self) -> bool:
        return not self.room.is_set()

    async def send(self, body: bytes, more: bool = True) -> None:
        await self.room.wait()
        self.received.append(body)

    def send_soon(self, body: bytes) -> None:
        asyncio.get_running_loop().call_soon(self.received.append, body)

    def end_soon(self, body: bytes) -> None:
        self.send_soon(body)

    def ended(self) -> None:
        """A connection may be closed here, so all of the reply has been written."""
        assert self.received[-1].endswith(DONE)


async def stream(seed: int, prompts: int, usage: bool) -> tuple[list[str], list[Any]]:
    """The texts of each prompt, and all chunks that came, of news and pauses as chance has them."""
    chance = random.Random(seed)
    engine = EngineClient()
    engine.connection_made(cast(asyncio.Transport, Engine()))
    engine.data_received(wire.frame(wire.Hello(wire.PROTOCOL, FACTS)))
    asked = CompletionRequest(
        prompt=["x"] * prompts,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": usage},
    )
    reply = Completion(asked, "name", "model", FACTS, {}, 100, False)
    client = Client()
    caller = Caller(engine, Callers(), client)  # type: ignore[arg-type]
    caller.ask(reply.asks)
    for number in range(1, prompts + 1):
        engine.data_received(wire.frame(wire.Accepted(number, {"prompt_tokens": 1})))
    reply.accepted(await caller.accepted())

    async def start(message: Any) -> None: ...

    scope = {"state": {CONNECTION: client}}
    sending = asyncio.create_task(EventStream(caller, reply, None, {})(scope, start, start))  # type: ignore[arg-type]
    texts = [""] * prompts
    late = b""
    for step in range(STEPS + 1):
        items: list[list[Any]] = []
        for number in range(prompts):
            text = f"{step}." * chance.randrange(3)
            texts[number] += text
            if step == STEPS:
                output = [0, text, 1, "length", None, None]
                end = {"cached": 0, "queue": 0.0, "first_token": 0.0}
                items.append([number + 1, [output], end, None])
            elif chance.random() < 0.2:
                items.append([number + 1, [[0, text, 1, None, None, None]], None, None])
            else:
                items.append([number + 1, text, 1])
        late += wire.frame(wire.Deltas(items))
        if chance.random() < 0.3 and step < STEPS:
            continue
        engine.data_received(late)
        late = b""
        if chance.random() < 0.4:
            client.room.clear() if client.room.is_set() else client.room.set()
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
    client.room.set()
    await asyncio.wait_for(sending, 60)
    events = b"".join(client.received).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return texts, [json.loads(each.removeprefix("data: ")) for each in events[:-2]]


@pytest.mark.parametrize(("prompts", "usage"), [(1, False), (2, False), (1, True), (2, True)])
def test_pauses_change_no_text(prompts: int, usage: bool) -> None:
    for seed in range(8):
        texts, chunks = asyncio.run(stream(seed, prompts, usage))
        found, counts = [""] * prompts, [0]
        for chunk in chunks[:-1]:
            (choice,) = chunk["choices"]
            found[choice["index"]] += choice["text"]
            if usage:
                counts.append(chunk["usage"]["completion_tokens"])
        assert found == texts
        assert counts == sorted(counts)
        assert counts[-1] == (STEPS + 1) * prompts * usage
        assert chunks[-1]["usage"]["completion_tokens"] == (STEPS + 1) * prompts
