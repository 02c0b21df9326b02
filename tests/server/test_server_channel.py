"""An HTTP process that reads nothing, beside one that reads."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from reprise.config import EngineConfig
from reprise.engine import thread
from reprise.server import engine_server, wire
from reprise.server.engine_server import EngineLimits, EngineServer

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
        for _, *item in message.items if isinstance(message, wire.Deltas) else ():
            new, end, _ = item if len(item) == 3 else ([[0, *item]], None, None)
            outputs += new
            if end is not None:
                return outputs
    raise AssertionError("the messages have ended")


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happened()


@contextlib.contextmanager
def running(config: EngineConfig, limits: EngineLimits) -> Iterator[EngineServer]:
    server = EngineServer(config, limits)
    serving = threading.Thread(target=server.run, daemon=True)
    serving.start()
    try:
        yield server
    finally:
        server.stop()
        serving.join(30)
    assert not serving.is_alive()


def test_a_process_that_reads_nothing_costs_nobody_and_misses_nothing(device: str) -> None:
    with running(EngineConfig(device=device, num_blocks=100), EngineLimits()) as server:
        idle, news_of_idle = connect(server)
        busy, news_of_busy = connect(server)
        with idle, busy:
            idle.sendall(wire.frame(STREAM))
            busy.sendall(wire.frame(STREAM))
            expected = stream(news_of_busy)
            # The engine has come to the end of the other one too, of which nothing was read.
            deadline, load = time.monotonic() + 100, None
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


def test_a_burst_is_accepted_before_its_news(device: str) -> None:
    """Also where one of it waits for another."""
    config = EngineConfig(device=device, num_blocks=100, max_num_seqs=2)
    with running(config, EngineLimits()) as server:
        ours, messages = connect(server)
        with ours:
            asked = STREAM._replace(
                prompt={"prompt_token_ids": [5, 6]}, params={**PARAMS, "max_tokens": 3}
            )
            ours.sendall(b"".join(wire.frame(asked._replace(number=each)) for each in range(8)))
            accepted, ended = set(), set()
            while len(ended) < 8:
                message = next(messages)
                if isinstance(message, wire.Accepted):
                    accepted.add(message.number)
                    continue
                for number, *item in message.items:
                    assert number in accepted
                    if len(item) == 3 and item[1] is not None:
                        ended.add(number)


def test_who_leaves_before_the_engine_looks_is_not_computed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(EngineConfig(device=device, num_blocks=100), EngineLimits()) as server:
        driver: Any = server.driver
        left, leave = threading.Event(), driver.leave

        def told(*arguments: Any) -> None:
            leave(*arguments)
            left.set()

        monkeypatch.setattr(driver, "leave", told)
        ours, messages = connect(server)
        with ours:
            driver.between_steps(lambda: left.wait(30))  # both have been read before it goes on
            asked = STREAM._replace(prompt={"prompt_token_ids": [5, 6]})
            ours.sendall(wire.frame(asked) + wire.frame(wire.Leave(1)))
            assert left.wait(30)
            few = asked._replace(number=2, params={**PARAMS, "max_tokens": 2})
            ours.sendall(wire.frame(few))
            assert stream(messages)[-1][3] == "length"
            (stats,) = driver.ask("stats").result(30)
            assert stats.num_requests == 0
            assert stats.scheduler.total_generated_tokens == 2


def test_steps_go_on_however_much_is_wanted_between_them(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(EngineConfig(device=device, num_blocks=100), EngineLimits()) as server:
        driver: Any = server.driver
        ours, messages = connect(server)
        with ours:
            ours.sendall(wire.frame(STREAM._replace(prompt={"prompt_token_ids": [5, 6]})))
            next(messages)
            monkeypatch.setattr(thread, "MOST_BETWEEN_SECONDS", 0.0)
            steps: list[int] = []

            def one_more() -> None:
                steps.append(driver.engine.scheduler.num_generated_tokens)
                if steps[-1] < TOKENS - 2:
                    driver.between_steps(one_more)  # there is always another one

            driver.between_steps(one_more)
            stream(messages)
            assert len(set(steps)) > TOKENS / 2


def test_steps_go_on_in_the_midst_of_a_burst(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests that all came at once."""
    with running(EngineConfig(device=device, num_blocks=100), EngineLimits()) as server:
        driver: Any = server.driver
        ours, messages = connect(server)
        asked = STREAM._replace(prompt={"prompt_token_ids": [5, 6]})
        steps: list[int] = []
        submit = server._submit

        def noted(request: wire.Generate, *args: Any, **options: Any) -> None:
            steps.append(driver.engine.scheduler.num_generated_tokens)
            submit(request, *args, **options)

        with ours:
            ours.sendall(wire.frame(asked))
            next(messages)
            monkeypatch.setattr(thread, "MOST_BETWEEN_SECONDS", 0.0)
            monkeypatch.setattr(server, "_submit", noted)
            few = {**PARAMS, "max_tokens": 1}
            burst = [asked._replace(number=number, params=few) for number in range(2, 22)]
            ours.sendall(b"".join(wire.frame(each) for each in burst))
            left = {each.number for each in burst}
            while left:
                for number, *item in getattr(next(messages), "items", ()):
                    if len(item) == 3 and item[1] is not None:
                        left.discard(number)
        assert len(steps) == len(burst)
        assert len(set(steps)) > len(burst) / 2


def test_who_ends_while_a_process_goes_is_no_fault(device: str) -> None:
    """The engine's thread takes requests out, at any time."""
    with running(EngineConfig(device=device, num_blocks=100), EngineLimits()) as server:
        ours, messages = connect(server)
        (channel,) = server.channels
        dropped = threading.Event()

        class Ends:
            """Another one ends when this one is asked for."""

            name = "of nobody"

            @property
            def called(self) -> str:
                channel.readers.pop(8, None)
                dropped.set()
                return "mine"

        channel.readers.update({number: Ends() for number in (7, 8, 9)})
        ours.close()
        assert dropped.wait(30)
        ours, messages = connect(server)
        with ours:
            ours.sendall(wire.frame(STREAM))
            assert stream(messages)[-1][3] == "length"


def test_who_waits_between_steps_is_told_when_the_engine_is_stopped(device: str) -> None:
    with running(EngineConfig(device=device, num_blocks=100), EngineLimits()) as server:
        driver: Any = server.driver
        ours, messages = connect(server)
        with ours:
            go_on = threading.Event()
            driver.between_steps(lambda: go_on.wait(30))
            asked = STREAM._replace(prompt={"prompt_token_ids": [5, 6]})
            burst = [asked._replace(number=number) for number in range(3, 8)]
            ours.sendall(b"".join(map(wire.frame, burst)))
            until(lambda: driver._commands.qsize() >= len(burst))
            server.stop()
            until(lambda: driver.closed is not None)
            go_on.set()
            refused = {next(messages).number for _ in burst}
            assert refused == {each.number for each in burst}


def test_token_ids_are_prepared_between_steps_and_what_takes_long_beside_them(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(EngineConfig(device=device, num_blocks=100), EngineLimits()) as server:
        frontend: Any = server.driver.frontend
        threads, prepare = [], frontend.prepare

        def noted(prompt: Any) -> Any:
            threads.append((type(prompt), threading.current_thread().name.partition("_")[0]))
            return prepare(prompt)

        monkeypatch.setattr(frontend, "prepare", noted)
        monkeypatch.setattr(engine_server, "MOST_QUICK", 3)
        ours, messages = connect(server)
        with ours:
            for prompt in (
                {"prompt_token_ids": [5, 6, 7]}, {"prompt": "Once upon a time"},
                {"prompt_token_ids": [5, 6, 7, 8]},
            ):  # fmt: skip
                few = {**PARAMS, "max_tokens": 2}
                ours.sendall(wire.frame(STREAM._replace(prompt=prompt, params=few)))
                stream(messages)
    assert [name for kind, name in threads if kind is dict] == [
        "reprise-engine", "reprise-tokenizer", "reprise-tokenizer",
    ]  # fmt: skip


def test_each_of_a_burst_has_its_own_parameters(device: str) -> None:
    with running(EngineConfig(device=device, num_blocks=100), EngineLimits()) as server:
        ours, messages = connect(server)
        asked = STREAM._replace(prompt={"prompt_token_ids": [5, 6]})
        params = [
            {**PARAMS, "output_kind": "FINAL_ONLY", **each}
            for each in (
                {"max_tokens": 2}, {"max_tokens": 2}, {"max_tokens": 3}, {"max_tokens": 0},
                {"max_tokens": 3}, {"max_tokens": 2, "logit_bias": {"7": 100.0}},
                # Equal to Python, and refused.
                {"max_tokens": 1}, {"max_tokens": True}, {"max_tokens": 1.0},
                {"max_tokens": 2, "stop_token_ids": [1]},
                {"max_tokens": 2, "stop_token_ids": [True]},
            )
        ]  # fmt: skip
        with ours:
            frames = [
                wire.frame(asked._replace(number=number, params=each))
                for number, each in enumerate(params)
            ]
            ours.sendall(b"".join(frames))
            counts: dict[int, int | None] = {}
            while len(counts) < len(params):
                message = next(messages)
                if isinstance(message, wire.Refused):
                    (name,) = set(params[message.number]) - set(PARAMS) or {"max_tokens"}
                    assert f"{name}={params[message.number][name]}: give" in message.message
                    counts[message.number] = None
                for number, outputs, *_ in getattr(message, "items", ()):
                    counts[number] = outputs[0][2]
        found = [counts[number] for number in range(len(params))]
        assert found == [2, 2, 3, None, 3, 2, 1, None, None, 2, None]


def test_what_fails_before_the_engine_has_it_ends_nothing_else(device: str) -> None:
    config = EngineConfig(device=device, num_blocks=100)
    with running(config, EngineLimits()) as server:
        ours, messages = connect(server)
        with ours:
            asked = STREAM._replace(prompt={"prompt_token_ids": [5, 6]})
            unknown = asked._replace(number=7, params={**PARAMS, "output_kind": "NONE"})
            ours.sendall(wire.frame(unknown) + wire.frame(asked._replace(number=8)))
            refused = next(messages)
            assert (refused.number, refused.kind) == (7, "KeyError")
            assert next(messages).number == 8


def test_prompt_tokens_that_wait(device: str) -> None:
    """Some may always wait, however many; more only up to the limit, once for each completion."""
    config = EngineConfig(device=device, num_blocks=200, max_num_seqs=1)
    with running(config, EngineLimits(tokens=30)) as server:
        runner: Any = server.driver.engine.runner
        submit = runner.submit

        def takes_its_time(step: Any) -> Any:
            time.sleep(0.05)
            return submit(step)

        # The first request does not end before the others were sent, however late these are.
        runner.submit = takes_its_time
        connection, messages = connect(server)

        def ask(number: int, tokens: int, **params: Any) -> Any:
            """Send a request; what its acceptance is answered with."""
            ids = {"prompt_token_ids": [5] * tokens}
            params = {"temperature": 0, "max_tokens": 2, "output_kind": "FINAL_ONLY", **params}
            wanted = wire.Generate(number, f"{number}", ids, None, params, 0, [])
            connection.sendall(wire.frame(wanted))
            answers = (each for each in messages if not isinstance(each, wire.Deltas))
            return next(each for each in answers if each.number == number)

        with connection:
            running_one = ask(1, 40, max_tokens=1500, ignore_eos=True)
            while server.driver.engine.scheduler.num_waiting_tokens:
                time.sleep(0.01)
            found = [running_one, ask(2, 40), ask(3, 1)]
            server.driver.abort("request-2").result(100)
            found += [ask(4, 10), ask(5, 10, n=3, temperature=1), ask(6, 20), ask(7, 1)]
            kinds = [each.kind if isinstance(each, wire.Refused) else None for each in found]
            assert kinds == [None, None, "QueueFull", None, "QueueFull", None, "QueueFull"]
            assert "max_num_queued_tokens" in found[2].message
            assert server.driver.engine.scheduler.num_waiting_tokens == 30
            for number in (1, 4, 6):
                server.driver.abort(f"request-{number}").result(100)
            assert server.driver.engine.scheduler.num_waiting_tokens == 0
            assert not isinstance(ask(8, 100), wire.Refused)
