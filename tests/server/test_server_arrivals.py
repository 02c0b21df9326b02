"""Requests of a burst begin together: who is said to come, and how long a step waits for him."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from http_server import Server
from test_server_channel import PARAMS, STREAM, connect, running, stream

from reprise.config import EngineConfig
from reprise.engine import thread
from reprise.server import wire
from reprise.server.arrivals import Arrivals
from reprise.server.engine_server import EngineLimits

LONG = 1000.0
ASKED = STREAM._replace(
    prompt={"prompt_token_ids": [5, 6]}, params={**PARAMS, "max_tokens": 3}, more=True
)


# ---- who is said to come ------------------------------------------------------------------------


def test_an_arrival_is_believed_in_until_it_ends_or_is_late() -> None:
    now = 0.0
    arrivals = Arrivals(lambda: now)
    assert not arrivals.any()
    arrivals.expect("quick", 1.0)
    arrivals.expect("slow", 5.0)
    assert arrivals.any()
    arrivals.end("quick")
    arrivals.end("nobody")
    assert arrivals.any()
    now = 4.0
    assert arrivals.any()
    arrivals.expect("slow", 5.0)  # there is more of it
    now = 8.0
    assert arrivals.any()
    now = 9.0
    assert not arrivals.any()


def ask(body: dict[str, Any] | None = None) -> bytes:
    content = {"prompt": json.dumps({"more": 1}), "max_tokens": 1} if body is None else body
    data = json.dumps(content).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
    )


def answer(connection: socket.socket, count: int = 1) -> list[str]:
    """What of each of so many replies is its text, or its error."""
    reader, found = connection.makefile("rb"), []
    for _ in range(count):
        length = 0
        while line := reader.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        reply = json.loads(reader.read(length))
        found.append(reply["choices"][0]["text"] if "choices" in reply else "error")
    return found


@contextlib.contextmanager
def connections(server: Server, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        yield [
            stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(count)
        ]


def test_requests_of_a_burst_but_the_last_say_that_others_come(stub: Server) -> None:
    for _ in range(50):  # on a busy machine one may be asked before the next one is sent
        with connections(stub, 16) as burst:
            for each in burst:
                each.sendall(ask())
            told = [answer(each)[0] for each in burst]
        assert set(told) <= {"True", "False"}
        assert "False" in told
        if "True" in told:
            return
    raise AssertionError("none of a burst was said to have others behind it")


def test_several_prompts_of_one_request_come_together(stub: Server) -> None:
    prompts = [json.dumps({"more": 1})] * 3
    with stub.client() as client:
        reply = client.post("/v1/completions", json={"prompt": prompts}).json()
    assert [each["text"] for each in reply["choices"]] == ["True", "True", "False"]


def test_who_asks_nothing_of_the_engine_is_not_waited_for(stub: Server) -> None:
    """A request that is refused, one of another kind, one behind another of its connection, and a
    connection that is kept for later."""
    with connections(stub, 4) as (one, two, three, unused):
        time.sleep(0.1)
        two.sendall(ask({"prompt": 5}))
        assert answer(two) == ["error"]
        one.sendall(ask())
        assert answer(one) == ["False"]
        two.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(two) == ["error"]
        one.sendall(ask() + ask())
        assert answer(one, 2) == ["False", "False"]
        three.sendall(ask({"prompt": json.dumps({"wait": True})}))
        time.sleep(0.1)
        three.sendall(ask())
        time.sleep(0.01)
        two.sendall(ask())
        assert answer(two) == ["False"]
        two.sendall(ask()[:-5])  # it never comes to its end
        time.sleep(0.1)
        one.sendall(ask())
        assert answer(one) == ["False"]
        two.close()
        unused.close()


# ---- how long a step waits ----------------------------------------------------------------------


@contextlib.contextmanager
def waiting(
    device: str, monkeypatch: pytest.MonkeyPatch, next_: float, gathering: float, **options: Any
) -> Iterator[tuple[Any, socket.socket, Iterator[Any], list[int]]]:
    """A driver, a channel, its messages, and how many requests each step has had."""
    config = EngineConfig(device=device, num_blocks=100, **options)
    with running(config, EngineLimits()) as server:
        monkeypatch.setattr(thread, "NEXT_SECONDS", next_)
        monkeypatch.setattr(thread, "MOST_GATHERING_SECONDS", gathering)
        driver: Any = server.driver
        steps: list[int] = []
        submit = driver.engine._submit

        def noted(step: Any, *rest: Any) -> None:
            steps.append(len(step.rows))
            submit(step, *rest)

        monkeypatch.setattr(driver.engine, "_submit", noted)
        ours, messages = connect(server)
        with ours:
            yield driver, ours, messages, steps


def test_a_step_waits_for_a_request_that_is_said_to_come(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And behind the last one that is, since others may be on their way."""
    with waiting(device, monkeypatch, 1.0, LONG) as (driver, ours, messages, steps):
        added, add = threading.Event(), driver.engine.add

        def noted(*arguments: Any) -> Any:
            try:
                return add(*arguments)
            finally:
                added.set()

        monkeypatch.setattr(driver.engine, "add", noted)
        ours.sendall(wire.frame(ASKED))
        assert added.wait(30)
        time.sleep(0.1)
        assert not steps
        ours.sendall(wire.frame(ASKED._replace(number=2, more=False)))
        time.sleep(0.1)
        ours.sendall(wire.frame(ASKED._replace(number=3, more=False)))
        assert stream(messages)[-1][3] == "length"
        assert steps[0] == 3


def test_a_step_waits_for_texts_that_are_being_tokenized(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting(device, monkeypatch, 1.0, LONG) as (driver, ours, messages, steps):
        encode, frontend = driver.engine.prepare, driver.engine

        def slowly(prompt: Any) -> Any:
            time.sleep(0.1)
            return encode(prompt)

        monkeypatch.setattr(frontend, "prepare", slowly)
        texts = [ASKED._replace(number=each, prompt={"prompt": "Once"}) for each in (1, 2, 3)]
        ours.sendall(b"".join(map(wire.frame, texts)))
        assert stream(messages)[-1][3] == "length"
        assert steps[0] == 3


@pytest.mark.parametrize(("next_", "gathering"), [(0.05, LONG), (LONG, 0.05)])
def test_a_request_that_does_not_come_is_not_waited_for_long(
    device: str, monkeypatch: pytest.MonkeyPatch, next_: float, gathering: float
) -> None:
    with waiting(device, monkeypatch, next_, gathering) as (_, ours, messages, steps):
        ours.sendall(wire.frame(ASKED))
        assert stream(messages)[-1][3] == "length"
        assert steps[0] == 1


def test_a_single_request_is_not_waited_behind(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting(device, monkeypatch, LONG, LONG) as (_, ours, messages, steps):
        ours.sendall(wire.frame(ASKED._replace(more=False)))
        assert stream(messages)[-1][3] == "length"
        assert steps[0] == 1


def test_who_runs_does_not_wait_for_a_burst(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting(device, monkeypatch, LONG, LONG) as (_, ours, messages, steps):
        many = {**PARAMS, "max_tokens": 1000}
        ours.sendall(wire.frame(ASKED._replace(params=many, more=False)))
        while not isinstance(next(messages), wire.Deltas):
            pass
        ours.sendall(wire.frame(ASKED._replace(number=2)))
        ended = set()
        while 2 not in ended:
            for number, *item in getattr(next(messages), "items", ()):
                if len(item) == 3 and item[1] is not None:
                    ended.add(number)
        assert 2 in steps


def test_nothing_is_waited_for_that_a_step_has_no_room_for(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    with waiting(device, monkeypatch, LONG, LONG, **options) as (_, ours, messages, steps):
        whole = {"prompt_token_ids": list(range(5, 69))}
        ours.sendall(wire.frame(ASKED._replace(prompt=whole)))
        assert stream(messages)[-1][3] == "length"
        assert steps[0] == 1
