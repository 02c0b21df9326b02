"""Whichever process dies, and however: every caller is told at once, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import Server, Start, gone, until
from warm import SERVE_WITH

COMPLETE = "/v1/completions"
WAITING = {"prompt": json.dumps({"wait": True})}
BRIEF = {"prompt": json.dumps({"pieces": ["x"] * 20, "seconds": 0.15}), "stream": True}
LONG = {"prompt": json.dumps({"pieces": ["x"] * 10_000, "seconds": 0.05}), "stream": True}


def ask(server: Server, body: dict[str, Any]) -> tuple[int, str]:
    """Status and text; a broken connection is status 0."""
    text, status = "", 0
    try:
        with server.client() as client, client.stream("POST", COMPLETE, json=body) as response:
            status = response.status_code
            for part in response.iter_text():
                text += part
    except httpx.TransportError:
        return 0, text
    return status, text


def running(server: Server, pool: ThreadPoolExecutor, *bodies: dict[str, Any]) -> list[Future[Any]]:
    """Callers of which the engine knows."""
    asked = [pool.submit(ask, server, each) for each in bodies]
    with server.client() as client:
        until(lambda: client.get("/load").json()["server_load"] == len(bodies))
    return asked


def pids(server: Server) -> list[int]:
    return [each for group in server.children().values() for each in group]


def test_sigterm_lets_running_requests_end(start: Start, tmp_path: Path) -> None:
    server = start()
    children = pids(server)
    go_on = tmp_path / "go on"
    stream = {"prompt": json.dumps({"pieces": ["x"] * 20, "until": str(go_on)}), "stream": True}
    with ThreadPoolExecutor(4) as pool, server.client() as client:
        asked = running(server, pool, stream, stream)
        assert client.get("/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200  # alive
        refused = client.post(COMPLETE, json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["message"] == "the server is shutting down"
        go_on.touch()
        for each in asked:
            status, text = each.result(100)
            assert status == 200
            assert "".join(re.findall('"text":"(x*)"', text)) == "x" * 20
            assert text.endswith("data: [DONE]\n\n")
    assert server.process.wait(100) == 0
    until(lambda: all(map(gone, children)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_still_loads_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """Nobody can be waited for. All processes of a terminal get Ctrl-C, in the midst of imports
    too, and none prints where that came."""
    begun, engine = tmp_path / "begun", tmp_path / "engine.py"
    engine.write_text(
        f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(600)\n"
    )
    command = [sys.executable, SERVE_WITH, str(engine), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until(begun.exists)
        os.killpg(process.pid, number)
        _, told = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "nobody is waited for" in told
    assert "Traceback" not in told
    assert "is killed" not in told


@pytest.mark.long
def test_the_deadline_ends_what_does_not_end(start: Start) -> None:
    server = start("--shutdown-timeout", "0.3")
    with ThreadPoolExecutor(4) as pool:
        stream, plain = running(server, pool, LONG, WAITING)
        server.process.send_signal(signal.SIGINT)
        status, text = stream.result(100)
        assert status == 200
        assert "the server is shutting down" in text
        assert text.endswith("data: [DONE]\n\n")
        assert plain.result(100)[0] == 503
    assert server.process.wait(100) == 0


@pytest.mark.long
def test_a_second_signal_stops_at_once(start: Start) -> None:
    server = start("--shutdown-timeout", "100")
    children = pids(server)
    with ThreadPoolExecutor(4) as pool:
        asked = running(server, pool, LONG)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in server.log)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(100)
        asked[0].result(100)
    until(lambda: all(map(gone, children)))


def test_the_engines_death_is_told_at_once(start: Start) -> None:
    server = start()
    children = pids(server)
    (engine,) = server.children()["engine"]
    with ThreadPoolExecutor(4) as pool:
        stream, plain = running(server, pool, LONG, WAITING)
        began = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        status, text = stream.result(100)
        assert plain.result(100)[0] == 503
        assert time.monotonic() - began < 10  # of a second; the machine may be busy
    assert status == 200
    assert "the engine's process has ended" in text
    assert text.endswith("data: [DONE]\n\n")
    # The orchestrator is to start another one.
    assert server.process.wait(100) == 2
    assert "by signal 9 (SIGKILL)" in server.log
    until(lambda: all(map(gone, children)))


def test_an_http_process_is_replaced_and_nothing_outlives_the_parent(start: Start) -> None:
    """Its callers' connections break, and the engine is rid of their requests."""
    server = start("--api-server-count", "2")
    with ThreadPoolExecutor(8) as pool:
        asked = running(server, pool, *[LONG] * 6)
        first, second = server.children()["http"]
        os.kill(first, signal.SIGKILL)
        until(lambda: len({*server.children()["http"]} - {first, second}) == 1)
        os.kill(second, signal.SIGKILL)
        for each in asked:
            status, text = each.result(100)
            assert (status, text.endswith("[DONE]\n\n")) == (0, False)
    until(lambda: gone(first) and gone(second))  # whichever of them had the requests
    with server.client() as client:
        until(lambda: client.get("/load").json()["server_load"] == 0)
        assert client.post(COMPLETE, json={"prompt": "x"}).status_code == 200
        until(lambda: 'status="2xx"} ' in client.get("/metrics").text)
    until(lambda: len(server.children()["http"]) == 2)
    children = pids(server)
    assert len(children) == 3
    with ThreadPoolExecutor(4) as pool:
        asked = running(server, pool, LONG)
        server.process.kill()
        until(lambda: all(map(gone, children)))
        status, text = asked[0].result(100)
        # Both processes end by themselves. If the engine's is first, the other tells its callers.
        assert status == 0 or "the engine's process has ended" in text


def test_a_port_that_is_taken_is_told_before_anything_starts(start: Start, stub: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reprise", "serve", "--port", str(stub.port)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"--port={stub.port}" in done.stderr


@pytest.mark.long
def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reprise", "serve", "/nowhere/at/all", "--port", "0"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "/nowhere/at/all" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
def test_a_storm_of_disconnects_leaves_nothing(start: Start, count: int) -> None:
    server = start("--api-server-count", str(count))
    stop = threading.Event()

    def come_and_go(seed: int) -> None:
        while not stop.is_set():
            with server.client() as client:
                try:
                    with client.stream("POST", COMPLETE, json=LONG if seed % 2 else BRIEF) as found:
                        for number, _ in enumerate(found.iter_bytes()):
                            if number == seed % 5:
                                break
                except httpx.TransportError:
                    return

    with ThreadPoolExecutor(16) as pool:
        for seed in range(16):
            pool.submit(come_and_go, seed)
        time.sleep(1.5)
        stop.set()
    with server.client() as client:
        until(lambda: client.get("/load").json()["server_load"] == 0)
        assert client.post(COMPLETE, json={"prompt": "x"}).status_code == 200
    assert "Traceback" not in server.log


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_test_run_leaves_no_server_behind() -> None:
    program = (
        "import subprocess, sys, time\n"
        "from warm import end_with_parent\n"
        "child = subprocess.Popen(['sleep', '600'], preexec_fn=end_with_parent)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert run.stdout is not None
    child = int(run.stdout.readline())
    assert not gone(child)
    run.kill()
    run.communicate(timeout=30)
    until(lambda: gone(child))


WORKER_THAT_COMES_LATE = """
import os, signal, threading, time
from pathlib import Path
from reprise.processes import child
from reprise.server import supervisor
from reprise.server.options import ServerOptions
from reprise.config import EngineConfig

here = Path({here!r})
engine = '''
from pathlib import Path
from reprise.processes.control import Control
from reprise.testing import stub_engine
send = Control.send
def told(self, word):
    send(self, word)
    Path({here!r}, "engine").touch()
Control.send = told
stub_engine.main()
'''
worker = '''
import time
from pathlib import Path
from reprise.server import worker
while not Path({here!r}, "engine").exists():
    time.sleep(0.01)
time.sleep(0.3)
Path({here!r}, "worker").touch()
worker.main()
'''
supervisor.WORKER = ("-c", worker)
child.STOPPED_SECONDS = 0.05

def announce(address):
    print((here / "worker").exists(), flush=True)
    threading.Thread(target=stop_one, daemon=True).start()

def stop_one():
    pid = served._workers[0].process.pid
    os.kill(pid, signal.SIGSTOP)
    while pid in [each.process.pid for each in served._workers] or served._awaited:
        time.sleep(0.01)
    print("replaced", flush=True)
    served._signals.append(15)

served = supervisor.Supervisor(
    EngineConfig(), ServerOptions(host="127.0.0.1", port=0, api_server_count=2),
    engine_command=("-c", engine), announce=announce,
)
served.run()
"""


def test_ready_is_said_when_every_http_process_is(tmp_path: Path) -> None:
    """The first caller is not told that the model is being loaded. One that somebody stops
    (SIGSTOP) is replaced, and the server goes on."""
    program = WORKER_THAT_COMES_LATE.format(here=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\nreplaced\n"), done.stderr
