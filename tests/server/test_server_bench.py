"""``reprise bench serve``: what it measures of servers is what they did."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from http_server import Server, Start, at_rest, until
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from reprise.bench.distributions import plot_distributions
from reprise.bench.endpoint import Answer
from reprise.bench.serve import figures, times_of
from reprise.bench.work import ServeWork, arrivals, make_prompts
from reprise.cli.app import app
from reprise.errors import ConfigError

SMALL = (
    "--num-prompts",
    "12",
    "--input-len-range",
    "4:30",
    "--output-len-range",
    "3:20",
    "--ignore-eos",
)


def bench(server: Server, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", "--base-url", server.url, *arguments])


def totals(server: Server) -> dict[str, float]:
    """The server's own counters."""
    with server.client() as client:
        text = client.get("/metrics").text
    found = re.findall(r"^vllm:(\w+_tokens_total)\{.*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_are_those_that_the_server_counts(server: Server, chat: bool) -> None:
    before = totals(server)
    flags = ("--chat",) if chat else ()
    result = bench(server, *SMALL, *flags, "--request-rate", "200,inf", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    after = totals(server)
    work = ServeWork(12, (4, 30), (3, 20))
    asked = [each.output_tokens for each in make_prompts(work, chat)]
    spent = {name: after[name] - before[name] for name in after}
    # The first request is sent once more, to begin with.
    assert spent["generation_tokens_total"] == 2 * sum(asked) + asked[0]
    for each in record["results"]:
        assert each["failed"] == 0
        assert each["output_tokens"] == sum(asked)
        assert each["output_tokens_per_s"] == pytest.approx(sum(asked) / each["seconds"], rel=0.02)
        assert 0 < each["ttft_ms"]["p50"] <= each["e2el_ms"]["p50"]
    if not chat:
        lengths = sum(len(each.text) for each in make_prompts(work, chat))
        assert record["results"][0]["input_tokens"] == lengths
    assert [each["request_rate"] for each in record["results"]] == [200.0, None]


def test_times_are_the_servers(stub: Server, tmp_path: Path) -> None:
    """Of a server whose steps take a known time. No answer ends sooner, however busy the machine;
    but who reads the first chunk late sees the others follow at once."""
    plot = tmp_path / "times.svg"
    result = bench(
        stub, "--chat", "--num-prompts", "3", "--input-len-range", "1:4",
        "--output-len-range", "5:5", "--goodput", "ttft:60000", "--goodput", "tpot:0.001",
        "--percentiles", "0,100", "--plot", str(plot), "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert (found["completed"], found["output_tokens"]) == (3, 15)
    assert found["goodput_requests_per_s"] == 0, "none is that quick behind the first token"
    assert found["e2el_ms"]["p0"] >= 4  # a step of the stub takes a millisecond
    further = found["e2el_ms"]["mean"] - found["ttft_ms"]["mean"]
    assert 4 * found["tpot_ms"]["mean"] == pytest.approx(further, abs=0.01)
    drawn = ElementTree.parse(plot).getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) == 3


def test_requests_under_way_are_limited_and_wait_here(stub: Server) -> None:
    result = bench(
        stub, "--chat", "--num-prompts", "4", "--input-len-range", "1:1",
        "--output-len-range", "30:30", "--max-concurrency", "1", "--percentiles", "100", "--json",
    )  # fmt: skip
    (found,) = json.loads(result.stdout)["results"]
    took, late = found["e2el_ms"], found["late_ms"]
    # The last one waits for three others, whichever of the four was the slowest.
    assert late["p100"] >= 0.95 * (4 * took["mean"] - took["p100"])


def test_several_processes_send_what_one_would(stub: Server) -> None:
    result = bench(
        stub, "--num-prompts", "7", "--input-len-range", "3", "--output-len-range", "2:40",
        "--max-concurrency", "5", "--client-processes", "3", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    work = ServeWork(7, (3, 3), (2, 40))
    assert found["output_tokens"] == sum(each.output_tokens for each in make_prompts(work, False))
    assert (found["completed"], found["unfinished"]) == (7, 0)
    assert found["client_busy"] > 0
    assert found["ttft_ms"]["p50"] < found["e2el_ms"]["p50"] < 1e3 * found["seconds"]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_prints_what_there_is(stub: Server, tmp_path: Path, processes: str) -> None:
    """Two requests end, and two never do."""
    prompts = [{"prompt": json.dumps(each), "output_tokens": 3} for each in ({}, {"wait": True})]
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text("\n".join(map(json.dumps, prompts)) + "\n")
    name = f"before {processes}".replace(" ", "-")
    with stub.client() as client:  # lines of other tests have come before this one's
        client.get("/version", headers={"x-request-id": name})
    until(lambda: name in stub.log)
    before = stub.log.count("/v1/completions 200")
    run = subprocess.Popen(
        [sys.executable, "-m", "reprise", "bench", "serve", "--base-url", stub.url, "--json",
         "--num-prompts", "4", "--dataset", str(dataset), "--client-processes", processes],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: stub.log.count("/v1/completions 200") - before == 3)  # the first one comes twice
    with stub.client() as client:
        until(lambda: client.get("/load").json() == {"server_load": 2})
    for _ in range(3):  # what was sent to it, it has read
        until(lambda: at_rest(run.pid))
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=100)
    assert run.returncode == 130, err
    record = json.loads(out)
    (found,) = record["results"]
    assert (found["completed"], found["failed"], found["unfinished"]) == (2, 0, 2)
    assert record["interrupted"]


def test_failures_are_counted_by_kind(stub: Server, tmp_path: Path) -> None:
    prompts = [json.dumps({}), json.dumps({"fail": 2}), json.dumps({"fail": 1}), ""]
    kinds = [{"prompt": each or [1], "output_tokens": 5} for each in prompts]
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text("\n\n".join(map(json.dumps, kinds)))
    result = bench(stub, "--dataset", str(dataset), "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert (found["completed"], found["failed"], found["output_tokens"]) == (2, 2, 10)
    assert sum(each["count"] for each in found["failures"].values()) == 2
    assert found["failures"].keys() <= {"error in the stream", "status 500"}
    assert "RuntimeError" in str(found["failures"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no JSON"), ("3", "line 1 is no object"), ("", "has no prompts"),
        ('{"prompt": "a", "x": 1}', "line 1 has 'x'"), ('{"output_tokens": 1}', "give prompt"),
        ('{"prompt": ""}', "give prompt"), ('{"messages": []}', "--chat"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens=0 must be a whole number"),
    ],
)  # fmt: skip
def test_a_data_set_that_is_none(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "d"
    file.write_text(line)
    with pytest.raises(ConfigError, match=message):
        make_prompts(ServeWork(dataset=file), chat=False)


def test_a_data_set_begins_anew_and_has_chats(tmp_path: Path) -> None:
    file = tmp_path / "d"
    chat = [{"role": "user", "content": "hi"}]
    file.write_text(f'{{"messages": {json.dumps(chat)}, "output_tokens": 4}}\n{{"prompt": "a"}}')
    found = make_prompts(ServeWork(3, output_len_range=(7, 7), dataset=file), chat=True)
    assert [(each.text, each.output_tokens) for each in found] == [(chat, 4), ("a", 7), (chat, 4)]


@pytest.mark.long
def test_tokens_a_second_are_the_server_s_own(server: Server) -> None:
    """Against the counter and the gauge that somebody else reads beside the load."""
    seen: list[tuple[float, float, float]] = []
    ended = threading.Event()

    def watch() -> None:
        with server.client() as client:
            over = False
            while not over:
                over = ended.is_set()  # and one look behind the end
                text = client.get("/metrics").text
                running, waiting, tokens = (
                    float(re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]
                    for name in ("num_requests_running", "num_requests_waiting",
                                 "generation_tokens_total")
                )  # fmt: skip
                seen.append((time.perf_counter(), running + waiting, tokens))
                time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = bench(
        server, "--num-prompts", "32", "--input-len-range", "20", "--output-len-range", "200",
        "--max-concurrency", "8", "--ignore-eos", "--json",
    )  # fmt: skip
    ended.set()
    watcher.join()
    (found,) = json.loads(result.stdout)["results"]
    # The first request is not counted: the load begins when it has ended, and before there is more.
    base, every = seen[0][2] + 200, seen[0][2] + 200 + 32 * 200
    before = max(n for n, (_, busy, tokens) in enumerate(seen)
                 if tokens < base or (tokens == base and not busy))  # fmt: skip
    first = next(n for n, each in enumerate(seen) if each[2] > base)
    last = max(n for n, each in enumerate(seen) if each[2] < every)
    after = next(n for n, (_, busy, tokens) in enumerate(seen) if tokens == every and not busy)
    longest, shortest = seen[after][0] - seen[before][0], seen[last][0] - seen[first][0]
    assert found["output_tokens"] == 32 * 200
    assert seen[-1][2] == every
    assert 0.98 * 6400 / longest < found["output_tokens_per_s"]
    assert shortest == 0 or found["output_tokens_per_s"] < 1.02 * 6400 / shortest


def test_nobody_there(start: Start) -> None:
    server = start()
    server.close()
    result = bench(server, *SMALL)
    assert result.exit_code == 2
    assert "is a server there" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--goodput", "speed:3"], "--goodput=speed:3 must be milliseconds of one of ttft"),
        (["--goodput", "ttft"], "'ttft' must be NAME:MS"),
        (["--request-rate", "0"], "--request-rate=0.0 must be above 0"),
        (["--request-rate", "fast"], "'fast' is no number"),
        (["--burstiness", "nan"], "--burstiness=nan must be above 0"),
        (["--percentiles", "50,101"], "--percentiles=101 must be from 0 to 100"),
        (["--output-len-range", "9:3"], "'9:3' is not a range"),
        (["--model", "other"], "other"),
    ],
)
def test_odd_options_are_refused(stub: Server, arguments: list[str], message: str) -> None:
    result = bench(stub, *arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.stderr)


@given(
    rate=st.floats(0.5, 500), burstiness=st.floats(0.2, 5), count=st.integers(1, 50),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_arrivals_are_in_order_and_of_the_seed(
    rate: float, burstiness: float, count: int, seed: int
) -> None:
    work = ServeWork(burstiness=burstiness, seed=seed)
    found = arrivals(work, count, rate)
    assert len(found) == count
    assert found[0] == 0
    assert found == sorted(found)
    assert found == arrivals(work, count, rate)
    # Time goes by the rate alone.
    assert arrivals(work, count, 2 * rate) == pytest.approx([each / 2 for each in found])


@pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_times_between_arrivals_have_their_mean_and_spread(
    burstiness: float, spread: float
) -> None:
    """The standard deviation of a gamma distribution is its mean over the root of its shape."""
    found = arrivals(ServeWork(burstiness=burstiness), 20_000, 8.0)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((each - mean) ** 2 for each in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 8, rel=0.06)
    assert deviation == pytest.approx(spread / 8, rel=0.08)


def test_figures_of_known_times() -> None:
    good = Answer(10.0, arrivals=[10.1, 10.2, 10.4], ended=10.5, input_tokens=7, output_tokens=5)
    slow = Answer(10.0, arrivals=[11.0], ended=11.0, input_tokens=3, output_tokens=1)
    lost = Answer(10.0, arrivals=[10.1], ended=12.0, error="no", kind="status 500")
    found = figures([good, slow, lost], 2.0, (50,), {"ttft": 200.0})
    assert (found["completed"], found["failed"]) == (2, 1)
    assert found["failures"] == {"status 500": {"count": 1, "first": "no"}}
    assert (found["output_tokens"], found["output_tokens_per_s"]) == (6, 3.0)
    assert found["goodput_requests_per_s"] == 0.5
    assert found["ttft_ms"]["mean"] == pytest.approx(550)
    assert found["tpot_ms"] == {"mean": 100.0, "p50": 100.0}, "0.4 s over four tokens"
    assert found["itl_ms"]["mean"] == pytest.approx(150)
    assert found["e2el_ms"]["mean"] == pytest.approx(750)


def test_a_plot_without_an_answer_is_empty() -> None:
    lost = Answer(1.0, error="no")
    record = {
        "model": "<m>", "num_prompts": 1, "endpoint": "/v1/completions",
        "results": [{"request_rate": 2.0}],
    }  # fmt: skip
    drawn = plot_distributions(record, [times_of([lost])])
    assert "&lt;m&gt;" in drawn
    assert "polyline" not in drawn
