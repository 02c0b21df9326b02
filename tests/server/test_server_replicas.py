"""A server with two replicas: the same answers, and no caller waits for a process that is gone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import Server, gone, replicas_of, until

COMPLETE = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
OPTIONS = ("--num-blocks", "400", "--dtype", "float32", "--data-parallel-size", "2")
ANSWER_SECONDS = 10


def begin(device: str, *options: str) -> Server:
    command = ["-m", "reprise", "serve", "--port", "0", "--device", device, *OPTIONS, *options]
    return Server(command)


@pytest.fixture(scope="module")
def replicated(device: str) -> Iterator[Server]:
    found = begin(device)
    yield found
    found.close()
    assert found.process.returncode in (0, 2), found.log


def processes(server: Server) -> dict[str, list[int]]:
    """Of a server: ``http``, ``engine`` (which has the router) and ``replica``."""

    found = server.children()
    return {**found, "replica": replicas_of(found["engine"][0])}


def ask(server: Server, body: dict[str, Any]) -> tuple[int, str, float]:
    """Status, text and when it came; a broken connection is status 0."""
    text, status = "", 0
    try:
        with server.client() as client, client.stream("POST", COMPLETE, json=body) as response:
            status = response.status_code
            for part in response.iter_text():
                text += part
    except httpx.TransportError:
        status = 0
    return status, text, time.monotonic()


def ask_on(server: Server, stream: bool) -> tuple[int, str, float]:
    """Long requests, until one does not come to its end."""
    while '"finish_reason":"length"' in (found := ask(server, {**LONG, "stream": stream}))[1]:
        pass
    return found


def test_answers_are_those_of_one_engine(server: Server, replicated: Server) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "logprobs": 2},
        {"prompt": ["A cat", "47 + 38 ="], "max_tokens": 8, "temperature": 0.9, "seed": 5, "n": 2},
        {"prompt": "One day", "max_tokens": 40, "temperature": 0, "stop": ["."], "echo": True},
    ]
    for body in bodies:
        found = []
        for each in (server, replicated):
            with each.client() as client:
                whole = client.post(COMPLETE, json=body).json()
            status, text, _ = ask(each, {**body, "stream": True})
            events = [
                json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")
            ]
            parts: dict[int, str] = {}
            for event in events:
                for choice in event["choices"]:
                    parts[choice["index"]] = parts.get(choice["index"], "") + choice["text"]
            assert status == 200
            texts = {each["index"]: each["text"] for each in whole["choices"]}
            assert parts == texts
            found.append((texts, [each["finish_reason"] for each in whole["choices"]]))
        assert found[0] == found[1]


def test_metrics_tell_replicas_apart(replicated: Server) -> None:
    with replicated.client() as client:
        for each in range(4):
            client.post(COMPLETE, json={**LONG, "prompt": f"{each}", "max_tokens": 5})
        lines = client.get("/metrics").text.splitlines()
        chat = client.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
        )
        assert chat.status_code == 200, chat.text
    tokens = {
        engine: float(line.split()[-1])
        for line in lines
        for engine in "01"
        if line.startswith("vllm:generation_tokens_total") and f'engine="{engine}"' in line
    }
    assert len(tokens) == 2
    assert all(tokens.values())


@pytest.mark.parametrize(
    ("who", "number"),
    [
        ("replica", signal.SIGKILL),
        *(
            pytest.param(who, number, marks=pytest.mark.long)
            for who in ("replica", "engine", "http")
            for number in (signal.SIGSTOP, signal.SIGKILL)
            if (who, number) != ("replica", signal.SIGKILL)
        ),
    ],
)
def test_every_caller_is_answered(device: str, who: str, number: int) -> None:
    rng = random.Random(f"{who} {number}")
    server = begin(device, "--log-level", "warning")
    found = processes(server)
    assert [len(found[each]) for each in ("http", "engine", "replica")] == [1, 1, 2]
    everyone = [pid for pids in found.values() for pid in pids]
    log: Path | None = None
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask_on, server, each % 2 == 0) for each in range(4)]
        with server.client() as client:
            until(lambda: client.get("/load").json()["server_load"] == len(asked))
        time.sleep(rng.uniform(0, 1))
        chosen = rng.choice(found[who])
        os.kill(chosen, number)
        began = time.monotonic()
        for each in asked:
            status, text, when = each.result(100)
            assert when - began < ANSWER_SECONDS
            if who == "replica":
                assert status in (200, 503), text
                assert f"replica {found[who].index(chosen)} (" in text
                assert ("SIGKILL" if number == signal.SIGKILL else "SIGSTOP") in text
                assert "its last message:" in text
                log = Path(text.partition("its log: ")[2].partition(".log")[0] + ".log")
    if who != "http":
        assert server.process.wait(100) == 2
        until(lambda: all(map(gone, everyone)))
    else:  # another one takes its place
        status, text, _ = ask(server, {**LONG, "max_tokens": 3})
        assert status == 200, text
        server.close()
    if log is not None:
        assert log.exists()
        for each in log.parent.iterdir():
            each.unlink()
        log.parent.rmdir()
