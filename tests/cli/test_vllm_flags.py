"""Lines that start vLLM's server start this one, or are refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from reprise.cli.serve import _of_vllm, register
from reprise.cli.vllm_flags import HANDED_ON, flags_named, handed_on, translated
from reprise.config import EngineConfig
from reprise.errors import ConfigError
from reprise.server.options import ServerOptions
from reprise.server.supervisor import Supervisor
from reprise.vllm_names import ENGINE, SERVER

WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
SERVER_FIELDS = frozenset(ServerOptions.__dataclass_fields__)
GIVEN = [
    (group, name)
    for group in (*ENGINE, *SERVER)
    for name in group.neutral
    if name not in SERVER_FIELDS
]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    """Arguments to the options of engine and server, or to the output if it does not start."""
    made: list[Any] = []

    def start(self: Supervisor, config: Any, options: Any, *_: Any, **__: Any) -> None:
        made.append((config, options))

    monkeypatch.setattr(Supervisor, "__init__", start)
    monkeypatch.setattr(Supervisor, "address", "nowhere")
    monkeypatch.setattr(Supervisor, "run", lambda self: None)
    monkeypatch.setattr("reprise.compiling.begin", lambda *_: None)
    monkeypatch.setattr("reprise.server.logs.configure", lambda *_: None)
    app = typer.Typer()
    register(app)

    def run(*arguments: str) -> Any:
        made.clear()
        result = CliRunner().invoke(app, list(arguments), env=WIDE)
        assert (result.exit_code == 0) == bool(made), result.output
        return made[0] if made else result.output

    return run


def test_a_line_of_vllms(serve) -> None:
    config, options = serve(
        "some/model", "--trust-remote-code", "-tp", "2", "--enforce-eager", "--max_model_len=512",
        "--disable-log-requests", "--swap-space", "4", "--dtype", "half", "--max_num_seqs", "3",
        "--num-gpu-blocks-override", "40", "--enable-chunked-prefill", "--limit-mm-per-prompt",
        "{}", "--disable-uvicorn-access-log", "--uvicorn-log-level", "info", "--no-enable-lora",
        "--disable_custom_all_reduce", "--cudagraph-capture-sizes", "[]", "--port", "0",
    )  # fmt: skip
    assert config.model == "some/model"
    assert (config.tensor_parallel_size, config.graph_mode) == (2, "none")
    assert (config.max_model_len, config.max_num_seqs, config.num_blocks) == (512, 3, 40)
    assert config.dtype == "float16"
    assert not config.custom_all_reduce
    assert not options.access_log


def engine(*arguments: str) -> EngineConfig:
    """Of flags that are all vLLM's."""
    flags = list(translated(arguments, {}))
    assert flags[::2] == [HANDED_ON] * (len(flags) // 2)
    with flags_named(flags[1::2]):
        return EngineConfig(**_of_vllm(flags[1::2]))


def test_each_flag_is_accepted_where_it_asks_for_nothing_and_refused_elsewhere() -> None:
    for group, name in GIVEN:
        flag = "--" + name.replace("_", "-")
        for value in group.neutral[name]:
            if isinstance(value, bool):
                engine(flag if value else f"--no{flag[1:]}")
            else:
                engine(flag, value if isinstance(value, str) else json.dumps(value))
        for value in ("heard-of-never", "77"):
            with pytest.raises(ConfigError, match=f"^{flag}=.*{value}.*: "):
                engine(f"{flag}={value}")


def test_lists_as_vllm_has_them(serve) -> None:
    config, options = serve(
        "some/model", "--served-model-name", "a", "b", "--api-key", "k", "l", "--port", "0",
        "--allowed-origins", '["x", "y"]', "--allowed-methods", "GET", "--allowed-methods", "PUT",
    )  # fmt: skip
    assert (config.model, options.port) == ("some/model", 0)
    assert options.served_model_name == ("a", "b")
    assert options.api_key == ("k", "l")
    assert options.allowed_origins == ("x", "y")
    assert options.allowed_methods == ("GET", "PUT")
    config, options = serve("--served-model-name", "a", "some/model")
    assert (config.model, options.served_model_name) == ("some/model", ("a",))
    for wrong in ('["x"', "[1]"):
        assert "Invalid value for '--allowed-origins'" in serve("--allowed-origins", wrong)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--swap-space", "8"], "--swap-space=8: the cache lives on the device"),
        (["--enable-lora"], "--enable-lora: LoRA adapters are not supported"),
        (["--no-enable-chunked-prefill"], "--no-enable-chunked-prefill: prompts longer than"),
        (["-pp", "2"], "--pipeline-parallel-size=2: devices are used by"),
        (["--cuda-graph-sizes", "1", "2", "--port", "0"], "--cuda-graph-sizes=[1, 2]: graphs are"),
        (["--lora-modules", "a=b"], "--lora-modules='a=b': LoRA adapters are not supported"),
        (["--enforce-eager", "--graph-mode", "full"], "--enforce-eager and --graph-mode='full'"),
    ],
)
def test_what_is_not_here_is_refused_as_it_was_typed(serve, given: list[str], error: str) -> None:
    assert error in " ".join(serve(*given).split())


def test_what_nobody_knows_is_no_option(serve) -> None:
    output = serve("--max-model-length", "5")
    assert "No such option: --max-model-length" in output
    assert "--max-model-len" in output


def test_an_option_without_its_value_does_not_take_the_next_one(serve, invoke) -> None:
    """As of a shell's variable that is not set: the key was the flag behind it."""
    for given in (["--api-key", "--port", "80"], ["--api_key", "--no-access-log"],
                  ["m", "--served-model-name", "-tp=2"],
                  ["--served-model-name", "--trust_remote_code"]):  # fmt: skip
        output = " ".join(serve(*given).replace("│", " ").split())
        assert "--api-key has no value" in output or "--served-model-name has no value" in output
    output = invoke("generate", "hi", "--model", "--seed", "1", env=WIDE).output
    assert "--model has no value: what follows, --seed, is an option" in output
    _, options = serve("--api-key=--port", "--port", "80")
    assert (options.api_key, options.port) == (("--port",), 80)
    assert serve("--hf-overrides", "{}", "--seed", "-1") is not None


def test_values_are_not_looked_at() -> None:
    takes = {"--stop": True, "--debug": False, "-n": True}
    same = ["--stop", "--trust-remote-code", "--debug", "x_y", "-n", "-1", "--", "--enable-lora"]
    assert list(translated(same, takes)) == same
    # One value, and what follows is the model; a list ends where a flag begins.
    found = list(translated(["--swap-space", "4", "model"], takes))
    assert found == [HANDED_ON, "swap_space=4", "model"]
    assert handed_on(['a={"b": "c=d"}', "e=x"]) == {"a": {"b": "c=d"}, "e": "x"}


def test_help_shows_options_under_their_headings(invoke) -> None:
    output = invoke("serve", "--help", env=WIDE).output
    assert HANDED_ON not in output
    headings = [line.split("─")[1].strip() for line in output.splitlines() if line[:1] == "╭"]
    assert "Engine" not in headings, "an option of the server has no heading"
