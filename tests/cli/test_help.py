"""Help and usage errors: complete, and without loading torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from reprise.cli.options import ONE_ENGINE
from reprise.config import EngineConfig

COMMANDS = [
    (),
    ("generate",),
    ("chat",),
    ("bench",),
    ("bench", "latency"),
    ("bench", "throughput"),
    ("bench", "startup"),
    ("doctor",),
    ("doctor", "ops"),
    ("doctor", "graphs"),
    ("doctor", "conformance"),
    ("doctor", "report"),
]
WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(invoke, command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: reprise" in result.output
    assert "\\" not in result.output


def test_every_engine_option_is_a_flag_with_its_documentation(invoke):
    """Of a command that runs one engine, or, if it is about several, of one that runs those."""
    text = invoke("generate", "--help", env=WIDE).output
    several = invoke("bench", "throughput", "--help", env=WIDE).output
    flags = {"ops": "--op", "enable_prefix_caching": "--no-enable-prefix-caching"}
    flags["custom_all_reduce"] = "--no-custom-all-reduce"
    for each in dataclasses.fields(EngineConfig):
        if each.name != "skip_tokenizer_init":
            shown = several if each.name in ONE_ENGINE else text
            assert flags.get(each.name, "--" + each.name.replace("_", "-")) in shown
    assert "New tokens in one step" in text
    assert "[default: 256]" in text


def test_defaults_are_named_once(invoke):
    text = invoke("doctor", "graphs", "--help", env=WIDE).output
    line = next(each for each in text.splitlines() if "--max-num-batched-tokens" in each)
    assert "[default: 256]" in line
    assert "Default:" not in line
    assert "[default: qwen3-0.6b]" in invoke("bench", "startup", "--help", env=WIDE).output


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["bench", "latency", "--nonsense"]]
)
def test_help_and_usage_errors_do_not_import_torch(arguments):
    program = (
        "import atexit, sys\nfrom reprise.cli import main\n"
        f"sys.argv = ['reprise', *{arguments!r}]\n"
        "heavy = 'torch', 'transformers', 'numpy'\n"
        "atexit.register(lambda: print('loaded', [m for m in heavy if m in sys.modules]))\n"
        "main()"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "loaded []"


def test_version(invoke):
    import reprise

    assert invoke("--version").output.strip() == f"reprise {reprise.__version__}"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("generate", "--max-token", "3"), "--max-tokens"),
        (("genrate",), "Did you mean 'generate'?"),
        (("generate", "--dtype", "float8"), "bfloat16"),
        (("generate", "--op", "rms_norm"), "NAME=IMPL"),
        (("generate", "--hf-overrides", "{x}"), "not valid JSON"),
        (("generate", "--hf-overrides", "[1]"), "not a JSON object"),
        (("bench", "latency", "--batch-size", "1,x"), "such as 1,64"),
        (("bench", "latency", "--batch-size", "²"), "such as 1,64"),
        (("bench", "latency", "--output-lens", "9,5", "--model", "./nowhere"), "shorter first"),
        (("bench", "throughput", "--input-len-range", "9:3"), "LOW:HIGH"),
        (("bench", "throughput", "--input-len-range", "²:³"), "LOW:HIGH"),
        (("bench", "latency", "--workload", "9b"), "0.6b-bs1"),
    ],
)
def test_wrong_usage_exits_2_with_a_hint(invoke, arguments, hint):
    result = invoke(*arguments, env=WIDE)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert result.stdout == ""
