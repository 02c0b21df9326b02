"""A trace holds the steps that it says, and its figures follow from its events."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter

import pytest
from helpers import TinyModels, make_llm, random_ids
from typer.testing import CliRunner

from reprise.bench.trace import HOST_PHASES, STEPS, device_figures, record_trace
from reprise.errors import RepriseError

PHASES = Counter({name: STEPS for _, _, name in HOST_PHASES})


def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur}


def ranges(trace: dict) -> Counter[str]:
    """How often each named range of the host is in a trace."""
    names = [each["name"] for each in trace["traceEvents"] if each.get("cat") == "user_annotation"]
    return Counter(name for name in names if name in PHASES)


def test_busy_is_the_union_of_what_overlaps():
    figures = device_figures(
        [
            {"ph": "M", "name": "process_name"},
            event("ignored", 0, 9999, "cpu_op"),
            event("upload", 80, 5, "gpu_memcpy"),  # before the first kernel
            event("a", 100, 100),
            event("b", 150, 100),  # begins early, behind a
            event("c", 160, 10),  # inside both
            event("a", 300, 100),
            event("clear", 400, 50, "gpu_memset"),  # follows at once
            event("download", 490, 10, "gpu_memcpy"),
        ],
        steps=2,
    )
    # Busy 100-250, 300-450 and 490-500 of 100-500 microseconds.
    assert figures is not None
    assert figures["ms_per_step"] == 0.2
    assert figures["device_busy_ms"] == 0.155
    assert figures["device_idle_share"] == 0.225
    assert figures["kernels"][0] == {
        "name": "a", "count_per_step": 1, "us_per_step": 100, "share": round(200 / 370, 4),
    }  # fmt: skip
    assert [each["name"] for each in figures["kernels"]] == ["a", "b", "clear", "c", "download"]
    assert sum(each["share"] for each in figures["kernels"]) == pytest.approx(1, abs=1e-3)


def test_only_the_largest_kernels_are_listed():
    figures = device_figures([event(f"k{n}", 100 * n, n + 1) for n in range(40)], steps=1)
    assert figures is not None
    assert [each["name"] for each in figures["kernels"]] == [f"k{n}" for n in range(39, 27, -1)]


@pytest.mark.parametrize("events", [[], [event("to host", 0, 5, "gpu_memcpy")]])
def test_no_kernels_no_figures(events):
    assert device_figures(events, steps=1) is None


def test_trace_holds_whole_steps_of_resident_requests(tiny: TinyModels, device, tmp_path):
    # 40 blocks of 16 tokens hold three requests of 30 + 128 tokens at once.
    llm = make_llm(tiny(max_position_embeddings=256), device, num_blocks=41)
    prompts = [random_ids(seed, 30) for seed in range(8)]
    originals = [vars(owner)[method] for owner, method, _ in HOST_PHASES]
    record = record_trace(llm.engine, prompts, tmp_path / "trace.json.gz")
    assert [vars(owner)[method] for owner, method, _ in HOST_PHASES] == originals
    assert record["batch_size"] == 3
    assert 30 < record["context"] < 30 + 128
    assert record["steps"] == STEPS
    with gzip.open(record["file"], "rt") as file:
        assert ranges(json.load(file)) == PHASES
    figures = [record[name] for name in ("ms_per_step", "device_busy_ms", "device_idle_share")]
    if llm.engine.platform.asynchronous:
        assert 0 < figures[1] <= figures[0]
        assert 0 <= figures[2] < 1
        assert record["kernels"]
    else:
        assert figures == [None] * 3
        assert record["kernels"] is None
    assert not llm.engine.has_work
    assert llm.stats().num_requests == 0


def test_a_file_that_cannot_be_written_is_an_error(tiny: TinyModels, device, tmp_path):
    llm = make_llm(tiny(max_position_embeddings=256), device)
    with pytest.raises(OSError):
        record_trace(llm.engine, [random_ids(0, 8)], tmp_path / "nowhere" / "trace.json")
    assert not llm.engine.has_work


def test_the_profilers_own_messages_are_off(monkeypatch):
    from reprise.cli.app import app

    # Set and unset, so that it is as before in the end.
    monkeypatch.setenv("KINETO_LOG_LEVEL", "0")
    monkeypatch.delenv("KINETO_LOG_LEVEL")
    CliRunner().invoke(app, ["bench", "latency", "--output-lens", "9,5"])
    assert os.environ["KINETO_LOG_LEVEL"] == "99"


def test_requests_that_end_too_early_are_an_error(tiny: TinyModels, device, tmp_path):
    llm = make_llm(tiny(max_position_embeddings=64), device)
    with pytest.raises(RepriseError, match=f"hold {STEPS} decode steps of 1 requests, and held"):
        record_trace(llm.engine, [random_ids(0, 40)], tmp_path / "trace.json")
    assert not llm.engine.has_work


@pytest.fixture(scope="module")
def requests(tiny: TinyModels, device) -> tuple[str, ...]:
    path = tiny(max_position_embeddings=256).path
    return "--model", str(path), "--load-format", "dummy", "--device", device, "--repeats", "1"


@pytest.mark.parametrize(
    "work",
    [
        ("latency", "--batch-size", "1,2", "--input-len", "8,16", "--output-lens", "2,4"),
        ("throughput", "--num-prompts", "2", "--input-len-range", "16:16",
         "--output-len-range", "2:4"),
    ],
    ids=["latency", "throughput"],
)  # fmt: skip
def test_trace_option(work, requests, tmp_path):
    from reprise.cli.app import app

    file = tmp_path / "trace.json"
    arguments = ["bench", *work, *requests, "--trace", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)["trace"]
    assert record["file"] == str(file)
    assert record["batch_size"] == 2
    assert record["context"] > 16
    assert ranges(json.loads(file.read_text())) == PHASES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", "trace.txt"), "ends in .json"),
        (("--trace", "nowhere/trace.json"), "is not a directory"),
        (("--trace", "link.json"), "cannot write"),
        (("--trace", "trace.json", "--input-len", "200"), "holds 256"),
    ],
)
def test_traces_that_could_not_be_made_are_refused_at_once(
    arguments, message, requests, tmp_path, monkeypatch
):
    from reprise.cli.app import app

    monkeypatch.chdir(tmp_path)
    link = tmp_path / "link.json"
    link.symlink_to("nowhere/trace.json")
    result = CliRunner().invoke(app, ["bench", "latency", *requests, *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [link]


def test_table_of_kernels(capsys):
    from reprise.cli.bench.shared import print_record

    kernel = {"name": "k[red]" * 20, "count_per_step": 2.0, "us_per_step": 9.5, "share": 0.5}
    trace = {
        "file": "x.json", "batch_size": 1, "context": 9, "steps": 20, "ms_per_step": 1.5,
        "device_busy_ms": 1.2, "device_idle_share": 0.2, "kernels": [kernel],
    }  # fmt: skip
    record = dict.fromkeys(("model", "load_format", "dtype", "device_name", "benchmark"), "m")
    record |= {"versions": {}, "repeats": 1, "date": "today", "trace": trace}
    print_record(record, False, [("a", "b"), (1, 2)])
    shown = capsys.readouterr().out
    assert "busy for 1.2 ms (idle: 20.0%)" in " ".join(shown.split())
    assert "k[red]" in shown
    assert "…" in shown
