"""``reprise bench serve``: what it measures of servers is what they did."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from http_server import Server, Start
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from reprise.bench.distributions import plot_distributions
from reprise.bench.endpoint import Answer
from reprise.bench.serve import ServeWork, arrivals, figures, make_prompts, times_of
from reprise.cli.app import app

SMALL = ("--num-prompts", "12", "--input-len-range", "4:30", "--output-len-range", "3:20")


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
        "--output-len-range", "30:30", "--max-concurrency", "1", "--json",
    )  # fmt: skip
    (found,) = json.loads(result.stdout)["results"]
    behind = 3 * found["e2el_ms"]["mean"]  # the last one waits for three others
    assert found["late_ms"]["p99"] >= 0.8 * behind


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
    work = ServeWork(num_prompts=count, burstiness=burstiness, seed=seed)
    found = arrivals(work, rate)
    assert len(found) == count
    assert found[0] == 0
    assert found == sorted(found)
    assert found == arrivals(work, rate)
    # Time goes by the rate alone.
    assert arrivals(work, 2 * rate) == pytest.approx([each / 2 for each in found])


@pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_times_between_arrivals_have_their_mean_and_spread(
    burstiness: float, spread: float
) -> None:
    """The standard deviation of a gamma distribution is its mean over the root of its shape."""
    found = arrivals(ServeWork(num_prompts=20_000, burstiness=burstiness), 8.0)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((each - mean) ** 2 for each in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 8, rel=0.06)
    assert deviation == pytest.approx(spread / 8, rel=0.08)


def test_figures_of_known_times() -> None:
    good = Answer(10.0, [10.1, 10.2, 10.4], 10.5, input_tokens=7, output_tokens=5)
    slow = Answer(10.0, [11.0], 11.0, input_tokens=3, output_tokens=1)
    lost = Answer(10.0, [10.1], 12.0, error="status 500: no")
    found = figures([good, slow, lost], 2.0, (50,), {"ttft": 200.0})
    assert (found["completed"], found["failed"]) == (2, 1)
    assert found["failures"] == {"status 500: no": 1}
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
