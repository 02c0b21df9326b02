"""A platform from a separate package: found by its entry point, it runs the demo model."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matrix
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reprise import LLM, platforms
from reprise.errors import PlatformError
from reprise.models.registry import architectures

PACKAGE = Path(__file__).parent


def plain(name: str) -> str:
    return name.replace("_", "").lower()


KNOWN = architectures()
FAMILIES = sorted(
    family for family, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    # Other families have models of these classes, too.
    if name in KNOWN and plain(f"{family}ForCausalLM") == plain(name)
)  # fmt: skip
ON_EXECUTORS = [
    pytest.param(
        family, executor,
        marks=[pytest.mark.long] * (
            executor != ("breakable", "full", "none")[number % 3]
            and (family, executor) != ("qwen3", "compiled")
        ),
    )
    for number, family in enumerate(FAMILIES) for executor in matrix.EXECUTORS
]  # fmt: skip
MATRIX = (
    (matrix.Features("full", "windows", 3), "neighbours"),
    (matrix.Features("breakable", matrix.HYBRID, 0), "bucket"),
    (matrix.Features("breakable", "experts", 1), "bucket"),
    (matrix.Features("none", "plain", 7), "preemption"),
)
"""Of the metamorphic matrix, what its maker would look at first."""
IN_TURN = zip(matrix.PRODUCT, itertools.cycle(matrix.DISTURBANCES), strict=False)
"""Long runs have all features, each under one of the disturbances."""
IN_MATRIX = [
    pytest.param(
        *each, id=": ".join(map(str, each)), marks=[pytest.mark.long] * (each not in MATRIX)
    )
    for each in dict.fromkeys([*MATRIX, *IN_TURN])
]


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


def test_the_demo_models_head_drafts(toy: str) -> None:
    """With graphs and without, the same drafts count, and no token is another."""
    prompts = ["12 + 34 =", "Once upon a time"]
    plain = token_ids(LLM(device="cpu", dtype="float32").generate(prompts, greedy(16)))
    found = []
    for device in (toy, f"{toy}-graphs"):
        llm = LLM(
            device=device, graph_mode="auto", graph_buckets="decode=2;mixed=16",
            graph_verify="off", max_model_len=64,
            speculative_config={"method": "eagle3", "num_speculative_tokens": 3},
        )  # fmt: skip
        assert token_ids(llm.generate(prompts, greedy(16))) == plain
        replayed = {each.owner for each in llm.graph_report().graphs if each.replays}
        owners = {"", "draft prefill", "draft chain"}
        assert replayed == (set() if device == toy else owners)
        found.append(llm.stats().drafts)
    assert found[0] == found[1]
    assert found[0].acceptance_length > 2
    assert_idle(llm)


def test_two_replicas_with_graphs(
    toy: str, installed: Path, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a platform that has graphs and nothing for several devices."""
    paths = [str(installed), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(each for each in paths if each))
    model = tiny("qwen3")
    options = {"max_num_seqs": 4, "graph_mode": "auto", "graph_buckets": "decode=1,4;mixed=32"}
    prompts = [random_ids(n, 5 * n) for n in range(1, 8)]
    with make_llm(model, f"{toy}-graphs", data_parallel_size=2, **options) as llm:
        assert llm.frontend.devices == ("cpu:0", "cpu:0"), "torch's name of the toy"
        outputs = token_ids(llm.generate(prompts, greedy(12)))
        for prompt, output in zip(prompts, outputs, strict=True):
            assert model.is_greedy(prompt, output)
        report = llm.graph_report()
    for each in report.replicas:
        assert each.plan == {"decode": "full", "mixed": "breakable"}
        assert each.replays > 5
        assert each.canary_failures == 0
        assert not each.quarantined


@pytest.mark.parametrize(("family", "executor"), ON_EXECUTORS)
def test_every_family_on_each_executor(
    toy: str, tiny: TinyModels, family: str, executor: str
) -> None:
    model = tiny(family)
    llm = make_llm(
        model, f"{toy}-graphs", graph_mode=executor, graph_buckets="decode=1,4;mixed=32",
        max_num_seqs=4, graph_verify="canary:2",
    )  # fmt: skip
    prompts = [random_ids(n, 5 * n) for n in range(1, 6)]
    params = [greedy(6 + 2 * n) for n in range(5)]
    for prompt, output in zip(prompts, generate(llm, prompts, params), strict=True):
        assert model.is_greedy(prompt, output)
    report = llm.graph_report()
    assert report.plan == {"decode": executor, "mixed": executor}
    assert len(report.graphs) == (0 if executor == "none" else 3)
    assert [each.name for each in report.graphs if not each.verified] == []
    assert [each.name for each in report.graphs if not each.replays] == []
    assert report.canary_failures == 0


@pytest.fixture(scope="module")
def alone(tiny: TinyModels) -> matrix.Alone:
    return matrix.Alone(tiny, "toy-graphs")


@pytest.mark.parametrize(("features", "disturbance"), IN_MATRIX)
def test_every_feature_on_each_executor(
    toy: str, alone: matrix.Alone, features: matrix.Features, disturbance: str
) -> None:
    case = replace(alone.case(features), device=f"{toy}-graphs")
    found = token_ids(case.under(disturbance))
    assert found == alone.tokens(features)


@pytest.mark.parametrize(
    ("file", "least"),
    [("graphs/test_graph_runner.py", 30),
     pytest.param("engine/test_graph_executors.py", 10, marks=pytest.mark.long)],
)  # fmt: skip
def test_the_suites_graph_tests_pass_on_it(installed: Path, file: str, least: int) -> None:
    """As its maker would run them: ``pytest --device toy-graphs``."""
    tests = PACKAGE.parent
    command = [
        sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider",
        "--device", "toy-graphs",
        "-k", "not compiled and not demo and not llama and not lies and not qwen3_moe",
        str(tests / file),
    ]  # fmt: skip
    paths = [str(installed), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in paths if each)}
    done = subprocess.run(
        command, env=variables, cwd=tests.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > least


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
