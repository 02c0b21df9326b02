"""The event stream of the live view, and what of the page needs no browser."""

from __future__ import annotations

import json
from bisect import bisect_left
from typing import Any

import hypothesis.strategies as st
import pytest
from http_server import Server, Start
from hypothesis import given, settings

from reprise.metrics import Distribution
from reprise.server.live.feed import Reader
from reprise.server.live.window import RATE_SECONDS, WINDOW_SECONDS, Counted, Window
from reprise.server.page import PAGE_PATHS

BOUNDS = [0.01, 0.1, 1.0, 10.0]


def counted(values: list[float]) -> Counted:
    found = Distribution(BOUNDS)
    for each in values:
        found.add(each)
    histogram = found.histogram("x", {})
    return Counted(histogram.buckets, histogram.sum)


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(0, 12), min_size=1, max_size=40),
    more=st.lists(st.floats(0, 12), max_size=40),
    part=st.floats(0.01, 1),
)
def test_quantiles_lie_in_the_bucket_of_the_true_one(
    values: list[float], more: list[float], part: float
) -> None:
    recent = counted(more + values) - counted(more)
    assert recent.count == len(values)
    found = recent.quantile(part)
    rank = min(len(values) - 1, max(0, -int(-part * len(values) // 1) - 1))
    place = min(bisect_left(BOUNDS, sorted(values)[rank]), len(BOUNDS) - 1)
    low = 0.0 if place == 0 else BOUNDS[place - 1]
    assert found is not None
    assert low - 1e-9 <= found <= BOUNDS[place] + 1e-9


def sample(tokens: int, latencies: list[float]) -> dict[str, Any]:
    both = counted(latencies)
    histogram = [both.buckets, both.sum]
    return {
        "metrics": [
            ["counter", "vllm:generation_tokens", {"engine": "0"}, tokens],
            ["counter", "vllm:generation_tokens", {"engine": "1"}, tokens],
            ["histogram", "vllm:e2e_request_latency_seconds", {"engine": "0"}, histogram],
            ["counter", "vllm:request_success", {"finished_reason": "stop"}, len(latencies)],
        ],
        "caches": [{"engine": 0, "lifetime": "kept", "used": 1, "total": 4}],
        "graphs": [],
    }


def test_rates_are_of_seconds_and_percentiles_of_a_minute() -> None:
    window = Window()
    assert window.fields() == {}
    window.add(sample(0, [5.0]), at=0.0)
    found = window.fields()
    assert found["tokens"].generated_per_second == 0
    assert found["latencies"].seconds is None  # none since: all there are
    assert found["latencies"].total.count == 1
    for second in range(1, 100):
        window.add(sample(10 * second, [5.0] * (1 + second)), at=float(second))
    found = window.fields()
    assert found["tokens"].generated == 2 * 990
    assert found["tokens"].generated_per_second == pytest.approx(20)
    assert found["latencies"].seconds == WINDOW_SECONDS
    assert found["latencies"].total.count == WINDOW_SECONDS
    assert found["requests"].finished == {"stop": 100}
    window.add(sample(990, [5.0] * 100), at=99 + RATE_SECONDS)
    assert window.fields()["tokens"].generated_per_second == 0


def event(server: Server, key: str | None = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with server.client(headers=headers) as client, client.stream("GET", "/live") as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        for line in response.iter_lines():
            if line.startswith("data: "):
                return dict(json.loads(line.removeprefix("data: ")))
    raise AssertionError("no event")


def test_events_say_what_the_other_endpoints_say(server: Server) -> None:
    with server.client() as client:
        body = {"prompt": "47 + 38 =", "temperature": 0, "max_tokens": 4}
        assert client.post("/v1/completions", json=body).status_code == 200
        seen = event(server)
        lines = client.get("/metrics").text.splitlines()
        graphs = client.get("/graphs").json()["graphs"]
    (tokens,) = (each for each in lines if each.startswith("vllm:generation_tokens_total"))
    assert seen["state"] == "serving"
    assert seen["tokens"]["generated"] == float(tokens.rpartition(" ")[2])
    assert [each["lifetime"] for each in seen["caches"]] == ["kept"]
    shown = seen["graphs"][0]["graphs"]
    assert [each["name"] for each in shown] == [f"{e['phase']}[{e['bucket']}]" for e in graphs]
    assert all(len(each["marks"]) == len(seen["graphs"][0]["facts"]) for each in shown)


def test_behind_a_proxy_with_a_key(start: Start) -> None:
    """A proxy strips the path: what is free without a key is the same, and nothing more is."""
    server = start("--root-path", "/llm", "--api-key", "k", "--api-server-count", "2")
    with server.client() as client:
        page = client.get("/")
        for path in sorted(PAGE_PATHS):
            found = client.get(path)
            assert found.status_code == 200, path
            assert "default-src 'none'" in found.headers["content-security-policy"]
        assert 'src="/llm/page/app.js"' in page.text
        assert "{{" not in page.text
        assert client.get("/health").status_code == 200
        for path in ("/live", "/graphs", "/v1/models", "/llm/live", "//x/live", "/page/"):
            assert client.get(path).status_code == 401, path
    assert {event(server, "k")["state"] for _ in range(6)} == {"serving"}


def test_the_end_of_a_server_waits_for_nobody_who_looks(start: Start) -> None:
    server = start("--shutdown-timeout", "1000")
    with server.client() as client, client.stream("GET", "/live") as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.terminate()
        list(lines)  # it ends, and properly
        assert server.process.wait(100) == 0


def test_a_reader_holds_one_event() -> None:
    reader = Reader()
    for each in range(1000):
        reader.put(b"%d" % each)
    assert reader.event == b"999"


def test_without_the_page(start: Start) -> None:
    server = start("--no-page")
    with server.client() as client:
        assert {client.get(path).status_code for path in ("/", "/live", "/page/app.js")} == {404}
        assert "/live" not in client.get("/openapi.json").json()["paths"]


def test_the_events_form_is_documented(stub: Server) -> None:
    with stub.client() as client:
        found = client.get("/openapi.json").json()
    content = found["paths"]["/live"]["get"]["responses"]["200"]["content"]
    assert content["text/event-stream"]["schema"] == {"$ref": "#/components/schemas/View"}
    named = found["components"]["schemas"]
    assert set(event(stub)) == set(named["View"]["properties"])
    assert {"Graph", "Graphs", "Latencies", "CacheUse"} <= named.keys()
