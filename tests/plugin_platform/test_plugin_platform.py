"""A platform from a separate package: found by its entry point, it runs the demo model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    TinyModels,
    assert_idle,
    generate,
    greedy,
    install_package,
    make_llm,
    random_ids,
    token_ids,
)

from reprise import LLM, platforms
from reprise.errors import PlatformError

PACKAGE = Path(__file__).parent
MATRIX = (
    "full, windows, 3 drafts", "breakable, hybrid, 0 drafts", "none, plain, 7 drafts",
    "breakable, experts, 1 drafts",
)  # fmt: skip
"""Of the metamorphic matrix, what its maker would look at first."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as pip would leave it after installing the package, made without a network."""
    site = tmp_path_factory.mktemp("site")
    install_package(PACKAGE, site)
    return site


@pytest.fixture
def toy(installed: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(installed))
    return "toy"


def test_not_installed() -> None:
    assert "toy" not in platforms.available()
    with pytest.raises(PlatformError, match="device='toy' is unknown"):
        platforms.resolve("toy")


def test_is_listed(toy: str) -> None:
    assert platforms.available()[toy] is None
    assert toy in platforms.names()
    platform = platforms.resolve(toy)
    assert type(platform).__mro__[1] is platforms.Platform
    assert type(platform).__module__ == "reprise_toy.platform"
    assert platforms.resolve("auto").name != toy, "its priority is low"
    with pytest.raises(PlatformError, match=r"known: auto, .*toy"):
        platforms.resolve("abacus")
    with pytest.raises(PlatformError, match="index 1 is out of range"):
        platforms.resolve("toy:1")


def test_runs_the_demo_model(toy: str) -> None:
    prompts = ["12 + 34 =", "Once upon a time"]
    llm = LLM(device=toy)
    outputs = llm.generate(prompts, greedy(24))
    assert outputs[0].outputs[0].text.split()[0].strip(".") == "46"
    assert token_ids(outputs) == token_ids(
        LLM(device="cpu", dtype="float32").generate(prompts, greedy(24))
    )
    assert_idle(llm)


def test_its_data_decides(toy: str, tiny: TinyModels, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("qwen3")
    with caplog.at_level("INFO", logger="reprise"):
        llm = LLM(str(model.path), device=toy, max_num_seqs=32, skip_tokenizer_init=True)
    assert "max_num_seqs: 32 -> 4 (a toy is small)" in caplog.text
    engine = llm.engine
    assert engine.scheduler.max_num_seqs == 4
    assert engine.scheduler.max_num_batched_tokens == 64
    assert engine.runner.block_size == 8
    assert {each.name for each in engine.runner.ops.chosen.values()} == {"reference"}
    prompts = [random_ids(n, 5 * n) for n in range(1, 8)]
    for prompt, output in zip(prompts, generate(llm, prompts, greedy(20)), strict=True):
        assert model.is_greedy(prompt, output)


def test_asking_for_graphs_that_it_has_not(
    toy: str, tiny: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompt = tiny("qwen3"), random_ids(1, 9)
    with caplog.at_level("WARNING", logger="reprise"):
        llm = make_llm(model, toy, max_num_seqs=2, graph_mode="full")
    assert "decode: full -> none (platform toy has no device graphs)" in caplog.text
    assert model.is_greedy(prompt, generate(llm, [prompt], greedy(9))[0])


def test_graphs_of_a_plug_in(toy: str, tiny: TinyModels, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is asked for: its data says that it captures, and that its memory can be measured."""
    model = tiny("qwen3")
    options = {"graph_mode": "auto", "graph_buckets": "decode=1,2,4;mixed=8,32"}
    llm = make_llm(model, f"{toy}-graphs", max_num_seqs=4, graph_verify="canary:2", **options)
    report = llm.graph_report()
    assert report.plan == {"decode": "full", "mixed": "breakable"}
    assert all(each.verified and each.quarantined is None for each in report.graphs)
    assert report.memory.note == ""
    assert report.memory.predicted == pytest.approx(report.memory.actual, rel=0.3)
    before = llm.engine.platform.num_replays
    prompts = [random_ids(n, 5 * n) for n in range(1, 8)]
    for prompt, output in zip(prompts, generate(llm, prompts, greedy(20)), strict=True):
        assert model.is_greedy(prompt, output)
    report = llm.graph_report()
    assert llm.engine.platform.num_replays > before
    assert report.replays > 20
    assert report.canary_failures == 0


def test_the_suites_graph_tests_pass_on_it(installed: Path) -> None:
    """As its maker would run them: ``pytest --device toy-graphs``."""
    tests = PACKAGE.parent
    command = [
        sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider",
        "--device", "toy-graphs",
        "-k", "not compiled and not demo and not llama and not lies and not qwen3_moe",
        str(tests / "graphs" / "test_graph_runner.py"),
        str(tests / "engine" / "test_graph_executors.py"),
        *(f"{tests / 'test_matrix.py'}::test_same_tokens[{each}: bucket]" for each in MATRIX),
    ]  # fmt: skip
    paths = [str(installed), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in paths if each)}
    done = subprocess.run(
        command, env=variables, cwd=tests.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 30


def test_a_plug_in_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported, and harms no other platform."""
    for name, target in (("broken", "no_such_module:X"), ("wrong", "json:loads")):
        information = tmp_path / f"{name}-1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        entry = f"[reprise.platforms]\n{name} = {target}\n"
        (information / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(tmp_path))
    report = platforms.available()
    assert "no_such_module" in str(report["broken"])
    assert "not a subclass of Platform" in str(report["wrong"])
    assert report["cpu"] is None
    for name in ("broken", "wrong"):
        with pytest.raises(PlatformError, match=name):
            platforms.resolve(name)
    assert platforms.resolve("auto").name in report
