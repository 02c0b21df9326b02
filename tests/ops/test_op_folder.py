"""Adding an op is one folder: what reads ops finds it there, and nothing else has to change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reprise

OP = Path(__file__).parents[1] / "plugin_model" / "reprise_guest" / "int8_linear"
CHECK = """
import torch
from reprise.doctor import conformance as kit
from reprise.doctor.facts import op_facts
from reprise.graphs import SegmentedGraph
from reprise.ops import OpTable, all_ops
from reprise.ops.cases import Maker
from reprise.platforms import load

platform = load("cpu")()
op = all_ops()["int8_linear"]
assert op.implementations["scaled"].function.__module__ == "reprise.ops.int8_linear.scaled"
for each in ("op_matches_reference", "op_is_deterministic"):
    print(kit.CONTRACTS[f"{each}:int8_linear"].check(kit.Kit(platform, "cpu")))
print(sorted(op_facts(OpTable(platform))["int8_linear"]["implementations"]))
arguments = op.cases.small(Maker(platform.device, torch.float32))[-1]
with torch.inference_mode(), OpTable(platform, {"int8_linear": "scaled"}).activate():
    graph = SegmentedGraph(platform, platform.graph_pool())
    out = graph.capture(lambda: op(**arguments), "nowhere")
    arguments["x"].mul_(2)
    graph.replay()
    torch.testing.assert_close(out, op(**arguments))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Reprise with one more folder in ``ops/``, where it can be imported from."""
    source = Path(reprise.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "demo_model")
    shutil.copytree(source, tmp_path / "reprise", ignore=ignored)
    folder = tmp_path / "reprise" / "ops" / "int8_linear"
    shutil.copytree(OP, folder, ignore=ignored)
    for file in folder.glob("*.py"):
        file.write_text(file.read_text().replace("reprise_guest.", "reprise.ops."))
    return tmp_path


def run(package: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=package, text=True, capture_output=True
    )


def test_a_folder_is_an_op(package: Path) -> None:
    done = run(package, CHECK)
    assert done.returncode == 0, done.stderr[-2000:]
    compared, same, implementations = done.stdout.splitlines()
    assert compared == "scaled in float32, bfloat16, float16"
    assert same == "reference"
    assert implementations == "['reference', 'scaled']"


def test_a_folder_without_cases_does_not_import(package: Path) -> None:
    declaration = package / "reprise" / "ops" / "int8_linear" / "__init__.py"
    declaration.write_text(declaration.read_text().replace("cases=cases, ", ""))
    done = run(package, "import reprise.ops")
    assert done.returncode != 0
    assert "missing 1 required keyword-only argument: 'cases'" in done.stderr
    assert "int8_linear" in done.stderr
