"""Whichever process ends or stands still, and whenever: every caller learns which, soon, and
nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import gone, replicas_of, until

import reprise
from reprise import LLM, AsyncLLM, SamplingParams
from reprise.errors import LoadError, RepriseError

ANSWER_SECONDS = 10
LONG = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
SMALL: dict[str, Any] = {"num_blocks": 400, "dtype": "float32"}


def children(of: int | None = None) -> list[int]:
    """Process ids of our replicas, or of another process's."""
    return replicas_of(of or os.getpid())


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where logs go: nobody else's are there."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


@contextlib.contextmanager
def clean(directory: Path) -> Iterator[None]:
    """No process stays behind the block, and no file."""
    before = set(children())
    yield
    until(lambda: all(gone(each) for each in set(children()) - before))
    until(lambda: not list(directory.iterdir()))


def explained(error: BaseException, number: int, how: str) -> str:
    """The log of a lost replica, which the error names with its last message."""
    text = str(error)
    assert f"replica {number} (" in text
    assert how in text
    found = re.search(r"its last message: (['\"])(.+?)\1; its log: (\S+\.log)", text)
    assert found, text
    assert found[2] in Path(found[3]).read_text()
    return found[3]


def remove(log: str) -> None:
    shutil.rmtree(Path(log).parent)


def lose(pid: int, number: int) -> tuple[float, str]:
    os.kill(pid, number)
    return time.monotonic(), {9: "SIGKILL", 19: "SIGSTOP"}[number]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)]
)
def test_every_caller_of_a_program_is_told(device: str, temporary: Path, number: int) -> None:
    """In the middle of steps: requests of both replicas, and questions."""

    async def main() -> None:
        llm = AsyncLLM(device=device, data_parallel_size=2, **SMALL)
        pids = children()
        assert len(pids) == 2

        async def read(name: str) -> None:
            while True:  # until it is told: one may come to its end before
                async for _ in llm.generate(name, LONG):
                    begun.add(name)

        begun: set[str] = set()
        readers = [asyncio.create_task(read(f"{each}")) for each in range(4)]
        while len(begun) < 4:
            await asyncio.sleep(0.01)
        began, how = lose(pids[1], number)
        asked = [asyncio.create_task(llm.stats()), asyncio.create_task(llm.abort("0"))]
        ended = await asyncio.gather(*readers, return_exceptions=True)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - began < ANSWER_SECONDS
        assert all(each is None or isinstance(each, RepriseError) for each in answers[1:])
        for each in (*ended, answers[0]):
            assert isinstance(each, RepriseError)
            log = explained(each, 1, how)
        for name in ("generate", "stats"):
            with pytest.raises(RepriseError, match="replica 1"):
                await (llm.stats() if name == "stats" else read("later"))
        until(lambda: all(map(gone, pids)))
        llm.shutdown()
        remove(log)

    with clean(temporary):
        asyncio.run(main())


def test_a_program_that_waits_for_all(device: str, temporary: Path) -> None:
    """Ctrl-C ends its requests and no replica; the end of one ends all."""
    with clean(temporary):
        llm = LLM(device=device, data_parallel_size=2, **SMALL)
        short = SamplingParams(temperature=0, max_tokens=5)
        expected = llm.generate(["a", "b"], short)[1].outputs

        def interrupted() -> None:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            llm.generate(["a", "b", "c"] * 4, LONG)

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        until(lambda: llm.stats().num_requests == 0, ANSWER_SECONDS)
        assert llm.generate(["a", "b"], short)[1].outputs == expected

        threading.Timer(0.3, lose, (children()[0], signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(RepriseError) as caught:
            llm.generate(["a", "b", "c"] * 4, LONG)
        assert time.monotonic() - began < ANSWER_SECONDS
        remove(explained(caught.value, 0, "SIGKILL"))
        for call in (llm.stats, llm.get_metrics, llm.reset_prefix_cache):
            with pytest.raises(RepriseError, match="replica 0"):
                call()
        llm.shutdown()
        with pytest.raises(RepriseError, match="shut down"):
            llm.generate("x")


SCRIPT = """
import sys
from reprise import LLM, SamplingParams
llm = LLM(device=sys.argv[1], data_parallel_size=2, num_blocks=400)
print(len(llm.generate(["a", "b"], SamplingParams(max_tokens=3))), flush=True)
if sys.argv[2] == "wait":
    llm.generate(["a"] * 8, SamplingParams(max_tokens=1900, ignore_eos=True))
    llm.generate(["a"] * 8, SamplingParams(max_tokens=1900, ignore_eos=True))
"""


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(each, marks=pytest.mark.long)
                       for each in (None, signal.SIGTERM, signal.SIGINT))],
)  # fmt: skip
def test_a_plain_script(device: str, temporary: Path, tmp_path: Path, number: int | None) -> None:
    """Without ``if __name__ == "__main__"``, without an end of its own; and one that is killed."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with clean(temporary):
        process = subprocess.Popen(
            [sys.executable, str(script), device, "end" if number is None else "wait"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "2\n", process.communicate()[1]
            pids = children(process.pid)
            if number is not None:
                assert len(pids) == 2
                time.sleep(0.2)
                process.send_signal(number)
            _, errors = process.communicate(timeout=60)
            until(lambda: all(map(gone, pids)), ANSWER_SECONDS)
        if number is None:
            assert (process.returncode, errors) == (0, "")


@pytest.mark.cold
def test_what_does_not_start(device: str, temporary: Path, tmp_path: Path) -> None:
    """The cause is the replica's own, by its type."""
    model = tmp_path / "model"
    shutil.copytree(Path(reprise.__file__).parent / "demo_model", model)
    (model / "model.safetensors").write_bytes(b"nothing of the kind")
    with clean(temporary), pytest.raises(LoadError, match=r"replica \d \("):
        LLM(str(model), device=device, data_parallel_size=2)


@pytest.mark.long
def test_a_loop_that_ends_ends_its_process(device: str, temporary: Path) -> None:
    """What comes is no message: whoever reads it must not stay as a process that answers nobody."""
    with clean(temporary):
        llm: Any = LLM(device=device, data_parallel_size=2, **SMALL)
        connection = llm._batch.replicas._wires.channels[0].connection
        connection.sendall((1 << 40).to_bytes(8, "little"))
        with pytest.raises(RepriseError, match="this is not the protocol") as caught:
            generate_on(llm)
        remove(explained(caught.value, 0, "status 1"))
        llm.shutdown()


@pytest.mark.cold
@pytest.mark.long
def test_a_replica_that_dies_while_it_starts(device: str, temporary: Path) -> None:
    """While torch is imported, weights are loaded, graphs are captured and verified."""
    rng = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGSTOP) * 3:
        with clean(temporary):
            found: list[Any] = []

            def start(found: list[Any] = found) -> None:
                try:
                    found.append(
                        LLM(device=device, data_parallel_size=2, graph_mode="full", **SMALL)
                    )
                except RepriseError as error:
                    found.append(error)

            thread = threading.Thread(target=start)
            thread.start()
            until(lambda: len(children()) == 2)
            time.sleep(rng.uniform(0, 4))
            chosen = rng.randrange(2)
            pids = children()
            if found or len(pids) < 2:
                continue
            began, how = lose(pids[chosen], number)
            thread.join(ANSWER_SECONDS)
            assert not thread.is_alive()
            assert time.monotonic() - began < ANSWER_SECONDS
            if isinstance(found[0], LLM):  # it was ready already
                with pytest.raises(RepriseError) as caught:
                    found[0].generate("x")
                remove(explained(caught.value, chosen, how))
                found[0].shutdown()
                continue
            assert f"replica {chosen} (" in str(found[0])
            assert how in str(found[0])
            log = re.search(r"its log: (\S+\.log)", str(found[0]))
            assert log is not None
            remove(log[1])


def generate_on(llm: LLM) -> None:
    for _ in range(20):
        llm.generate([[7] * 300, "b", "c", "d"] * 2, LONG)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_twenty_moments(device: str, temporary: Path) -> None:
    """Either replica, either way, at any moment: idle, in a prefill, in decodes, while it stops."""
    rng = random.Random(1)
    for round_ in range(20):
        with clean(temporary):
            llm = LLM(device=device, data_parallel_size=2, graph_mode="full", **SMALL)
            pids = children()
            chosen, number = rng.randrange(2), rng.choice((signal.SIGKILL, signal.SIGSTOP))
            moment = rng.choice(("idle", "steps", "steps", "end"))
            if moment == "end":
                os.kill(pids[chosen], number)
                began = time.monotonic()
                llm.shutdown()
                assert time.monotonic() - began < ANSWER_SECONDS + 1
                for each in temporary.iterdir():  # the log of one that was lost before it ended
                    shutil.rmtree(each)
                continue
            timer = threading.Timer(
                rng.uniform(0, 1) if moment == "steps" else 0, lose, (pids[chosen], number)
            )
            timer.start()
            if moment == "idle":
                time.sleep(0.5)
            began = time.monotonic()
            with pytest.raises(RepriseError) as caught:
                generate_on(llm)
            assert time.monotonic() - began < ANSWER_SECONDS + 1, round_
            remove(explained(caught.value, chosen, "SIG"))
            llm.shutdown()
