"""The README's commands work as printed, on small models in the place of large ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import tiny_config
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line.removeprefix("$ "), comments=True)
    for kind, block in BLOCKS
    if kind == "console"
    for line in block.splitlines()
    if line.startswith("$ ")
]
OURS = [each[1:] for each in COMMANDS if each[0] == "reprise" and each[1] != "serve"]
HUB = "Qwen/Qwen3-0.6B"
SMALL = ("--num-blocks", "160", "--device", "cpu")
SMALLER = {
    "generate": ("-n", "4", *SMALL),
    "chat": SMALL,
    "doctor graphs": ("--executors", "none,full", "--graph-buckets", "decode=1;mixed=16",
                      "--contexts", "16", *SMALL),
    "bench latency": ("--load-format", "dummy", "--output-lens", "2,4", "--repeats", "1", *SMALL),
}  # fmt: skip
"""Options of ours behind those that are printed: the last one counts."""


@pytest.mark.parametrize("arguments", OURS, ids=" ".join)
def test_a_command_runs(arguments, tmp_path, monkeypatch):
    from reprise.cli.app import app

    monkeypatch.chdir(tmp_path)  # some write files where they are run
    given = list(arguments)
    if HUB in given:
        given[given.index(HUB) - 1 :] = []
    name = next((each for each in SMALLER if " ".join(given).startswith(each)), "")
    given += SMALLER.get(name, ())
    if name == "bench latency":
        config = tiny_config("llama", architectures=["LlamaForCausalLM"]).to_dict()
        (tmp_path / "config.json").write_text(json.dumps(config))
        given += ("--model", str(tmp_path))
    result = CliRunner().invoke(app, given, input="/bye\n")
    assert result.exit_code == 0, result.output
    assert result.stdout or name == "chat" or "-o" in given


def test_named_models_of_benchmarks_exist():
    from reprise.bench.presets import model_names

    (bench,) = (each for each in OURS if each[0] == "bench")
    assert bench[bench.index("--model") + 1] in model_names()


def test_other_commands_are_what_this_directory_has():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = (["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"])
    for each in COMMANDS:
        if each[0] == "make":
            assert f"\n{each[1]}:" in makefile
        elif each[:2] == ["pip", "install"]:
            assert each[2:] in (["torch"], ["."])
        elif each[0] == "curl":
            assert each[1].startswith("http://127.0.0.1:8000/")  # tests/server runs it
        else:
            assert each[0] == "reprise" or each in known


def test_the_program_runs():
    (program,) = (block for kind, block in BLOCKS if kind == "python")
    assert HUB in program
    exec(program.replace(f'LLM("{HUB}")', 'LLM(num_blocks=160, device="cpu")'), {})


def test_the_demo_shows_its_prompts():
    """Redirected as well."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ndemo:")[2]
    lines = [each for each in recipe.partition("\n\n")[0].splitlines() if "generate" in each]
    assert lines
    assert all("--echo" in each for each in lines)
