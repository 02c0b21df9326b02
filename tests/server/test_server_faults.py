"""64 streams of the demo model while its engine fails: every caller is answered, no wrong token,
nothing is left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from http_server import Server, Start, until
from warm import FAULTY_ENGINE

from reprise import LLM, SamplingParams

pytestmark = pytest.mark.long

STREAMS = 64
COMPLETE = "/v1/completions"
SMALL = ("--num-blocks", "400")
GRAPHS = (
    "--graph-mode", "full", "--graph-verify", "canary:1", "--max-num-seqs", "4",
    "--max-num-batched-tokens", "32", "--graph-buckets", "decode=4;mixed=32", "--num-blocks", "200",
)  # fmt: skip


def prompt(number: int) -> str:
    return f"{number % 90 + 10} + {(number * 7) % 90} ="


@pytest.fixture(scope="module")
def expected(device: str) -> Iterator[list[str]]:
    """What each stream is to say."""
    with LLM(device=device, num_blocks=400) as llm:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        outputs = llm.generate([prompt(each) for each in range(STREAMS)], params, use_tqdm=False)
        yield [each.outputs[0].text for each in outputs]


def ask(server: Server, number: int, stream: bool = True) -> tuple[int, str, bool]:
    """Status, text, and whether it came to its own end."""
    body = {
        "prompt": prompt(number), "temperature": 0, "max_tokens": 40, "ignore_eos": True,
        "stream": stream,
    }  # fmt: skip
    try:
        with server.client() as client:
            response = client.post(COMPLETE, json=body)
    except httpx.TransportError:
        return 0, "", False
    if response.status_code != 200:
        assert "/some/path" not in response.text
        return response.status_code, "", False
    if not stream:
        choice = response.json()["choices"][0]
        return 200, choice["text"], True
    events = response.text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    chunks = [json.loads(each.removeprefix("data: ")) for each in events[:-2]]
    text = "".join(each["choices"][0]["text"] for each in chunks if "choices" in each)
    return 200, text, "error" not in chunks[-1]


def all_of_them(server: Server) -> list[tuple[int, str, bool]]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda number: ask(server, number, number % 4 != 3), range(STREAMS)))


def check_all(server: Server, expected: list[str], statuses: set[int]) -> int:
    """Ask them all: nobody is told anything wrong. Returns how many did not come to their end."""
    failed = 0
    for (status, text, ended), wanted in zip(all_of_them(server), expected, strict=True):
        assert status in statuses
        failed += not ended
        assert wanted.startswith(text)
        assert not ended or text == wanted
    return failed


def nothing_is_left(server: Server) -> None:
    with server.client() as client:

        def idle() -> bool:
            lines = client.get("/metrics").text.splitlines()
            busy = [
                each
                for each in lines
                if each.startswith(("vllm:num_requests", "vllm:kv_cache_usage_perc"))
                and not each.endswith(" 0.0")
            ]
            return not busy and bool(client.get("/load").json() == {"server_load": 0})

        until(idle)


def test_steps_that_raise(start: Start, expected: list[str]) -> None:
    server = start(*SMALL, engine=(FAULTY_ENGINE, "step"))
    assert sum(check_all(server, expected, {200, 500}) for _ in range(2))
    nothing_is_left(server)
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_logits_that_are_no_numbers(start: Start, expected: list[str]) -> None:
    """One request fails at a time; it is told why, and no other notices."""
    server = start(*SMALL, engine=(FAULTY_ENGINE, "nan"))
    failed = sum(check_all(server, expected, {200, 500}) for _ in range(2))
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
        (count,) = (each for each in lines if each.startswith("vllm:corrupted_requests_total"))
        assert float(count.rpartition(" ")[2]) == failed > 0
        errors = []
        for _ in range(40):
            body = {"prompt": "1 + 1 =", "max_tokens": 3, "ignore_eos": True}
            response = client.post(COMPLETE, json=body)
            if response.status_code != 200:
                errors.append(response.json()["error"])
    assert {each["code"] for each in errors} == {"non_finite_logits"}
    assert all("are not finite" in each["message"] for each in errors)
    nothing_is_left(server)


@pytest.mark.parametrize("fault", ["thread", "lost"])
def test_an_engine_that_ends(start: Start, expected: list[str], fault: str) -> None:
    server = start(*SMALL, engine=(FAULTY_ENGINE, fault))
    check_all(server, expected, {0, 200, 500, 503})
    assert server.process.wait(100) == 2
    assert "the engine's process ended" in server.log


def test_a_graph_that_goes_wrong(start: Start, expected: list[str]) -> None:
    server = start(*GRAPHS, engine=(FAULTY_ENGINE, "graph"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: ask(server, number), range(16)))
    assert [text for _, text, _ in found] == expected[:16]
    with server.client() as client:
        text = client.get("/metrics").text
        assert any(each["quarantined"] for each in client.get("/graphs").json()["graphs"])
    (failures,) = (
        float(each.rpartition(" ")[2])
        for each in text.splitlines()
        if each.startswith("reprise:graph_canary_failures_total")
    )
    assert failures > 0
    nothing_is_left(server)


def test_a_cache_that_holds_few_of_them(start: Start, expected: list[str]) -> None:
    server = start("--num-blocks", "20", engine=("-m", "reprise.server.engine_process"))
    assert [text for _, text, _ in all_of_them(server)] == expected
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    (preempted,) = (each for each in lines if each.startswith("vllm:num_preemptions_total"))
    assert not preempted.endswith(" 0.0")
    nothing_is_left(server)


def test_ten_thousand_that_wait(start: Start) -> None:
    server = start(*SMALL, engine=("-m", "reprise.server.engine_process"))
    prompts = [prompt(number) for number in range(100)]

    def many(_: int) -> list[str]:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            body: dict[str, Any] = {"prompt": prompts, "max_tokens": 1, "temperature": 0}
            return [each["text"] for each in client.post(COMPLETE, json=body).json()["choices"]]

    with ThreadPoolExecutor(100) as pool:
        asked = [pool.submit(many, each) for each in range(100)]
        with server.client() as client:  # probes are answered meanwhile
            for _ in range(20):
                began = time.monotonic()
                assert client.get("/health").status_code == 200
                assert time.monotonic() - began < 2
        found = [each.result() for each in asked]
    assert all(each == found[0] for each in found)
    assert len(found[0]) == 100
    nothing_is_left(server)


def test_a_full_queue_refuses_at_once(start: Start) -> None:
    server = start(
        *SMALL, "--max-num-queued-reqs", "8", engine=("-m", "reprise.server.engine_process")
    )
    with ThreadPoolExecutor(STREAMS) as pool:
        found = list(pool.map(lambda number: ask(server, number)[0], [*range(STREAMS)] * 2))
    assert set(found) <= {200, 429}
    assert 429 in found
    nothing_is_left(server)
