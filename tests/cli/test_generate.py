"""``reprise generate`` on the demo model."""

from __future__ import annotations

import fcntl
import json
import signal

import pytest

GREEDY = ("--temperature", "0", "--device", "cpu", "--num-blocks", "160")


def test_streams_the_completion_and_sums_up_on_stderr(invoke):
    result = invoke("generate", "47 + 38 =", *GREEDY)
    assert result.exit_code == 0
    assert result.stdout.strip() == "85"
    assert "tokens" in result.stderr
    assert "first token after" in result.stderr
    assert "\x1b" not in result.stdout


def test_quiet_prints_nothing_but_the_text(invoke):
    result = invoke("generate", "47 + 38 =", *GREEDY, "--quiet")
    assert result.stderr == ""


def test_echo_puts_the_prompt_first(invoke):
    result = invoke("generate", "47 + 38 =", *GREEDY, "-q", "--echo")
    assert result.stdout == "47 + 38 = 85\n"


def test_reads_standard_input(invoke):
    assert invoke("generate", "-", *GREEDY, "-q", input="47 + 38 =\n").stdout.strip() == "85"
    assert invoke("generate", *GREEDY, "-q", input="47 + 38 =\n").stdout.strip() == "85"


def test_without_a_prompt_it_tells_a_story(invoke):
    result = invoke("generate", *GREEDY, "-q", "-n", "8", input="")
    assert result.stdout.startswith("Once upon a time")


def test_stop_strings_and_length(invoke):
    story = invoke("generate", "Once upon a time", *GREEDY, "-n", "40").stdout
    word = story.split()[5]
    cut = invoke("generate", "Once upon a time", *GREEDY, "-n", "40", "--stop", word)
    assert cut.stdout.rstrip("\n") == story[: story.index(word)]
    limited = invoke("generate", "Once upon a time", *GREEDY, "-n", "3")
    assert "3 tokens" in limited.stderr
    assert "length limit" in limited.stderr


def test_drafts_of_the_demo_models_head_change_no_text(invoke):
    options = ("generate", "Once upon a time", *GREEDY, "--dtype", "float32", "-n", "24")
    plain, drafted = invoke(*options), invoke(*options, "--speculative")
    assert drafted.stdout == plain.stdout
    assert "tokens a step" in drafted.stderr
    assert "tokens a step" not in plain.stderr
    twice = invoke(*options, "--speculative", "--speculative-config", '{"method": "ngram"}')
    assert twice.exit_code == 2
    assert "give one of them" in twice.stderr


def test_seed_decides_the_draws(invoke):
    def draw(seed: str) -> str:
        options = ("--temperature", "1.5", "-n", "24", "--seed", seed)
        return invoke("generate", "Once upon a time", *GREEDY, *options).stdout

    assert draw("1") == draw("1") != draw("2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "--model", "./nowhere"), "no such directory"),
        (("x", "--device", "warp"), "--device='warp' is unknown"),
        (("x", *GREEDY, "--top-p", "2"), "--top-p=2.0"),
        (("x", *GREEDY, "--max-tokens", "-4"), "--max-tokens=-4"),
        (("x", "--op", "nope=torch"), "no such op"),
        (("x", "--block-size", "7"), "power of two"),
        (("", *GREEDY), "empty"),
        (("x " * 4000, *GREEDY), "tokens"),
    ],
)
def test_errors_are_one_line_and_exit_2(invoke, arguments, message):
    result = invoke("generate", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


@pytest.mark.parametrize("command", [("generate", "x"), ("chat",), ("doctor", "graphs")])
def test_names_of_benchmarks_are_no_models(invoke, command):
    result = invoke(*command, "--model", "qwen3-0.6b", env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "random weights" in result.stderr
    assert "Qwen/Qwen3-0.6B" in result.stderr


@pytest.mark.parametrize("typed", ["models/qwen", "./models/qwen", "models/x/y", "models/a.gguf"])
def test_a_mistyped_path_is_not_sought_on_the_hub(invoke, typed, tmp_path, monkeypatch):
    import huggingface_hub

    def fetched(*arguments, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "qwen3").mkdir(parents=True)
    result = invoke("generate", "x", "--model", typed)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: --model='{typed}': no such directory")
    if typed.endswith("qwen"):
        assert "did you mean 'models/qwen3'?" in result.stderr


def test_what_the_hub_does_not_have_may_be_a_directory_here(invoke, tmp_path, monkeypatch):
    import huggingface_hub

    def absent(*arguments, **options):
        raise OSError("404")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smol-lm2").mkdir()
    result = invoke("generate", "x", "--model", "smol-lm")
    assert result.exit_code == 2
    assert "did you mean 'smol-lm2'?" in result.stderr


def test_debug_gives_the_traceback(invoke):
    result = invoke("generate", "x", "--device", "warp", "--debug")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback")
    assert "PlatformError: device='warp' is unknown" in result.stderr


def test_an_unknown_architecture_is_named(invoke, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    result = invoke("generate", "x", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


LONG = (
    "generate",
    "Once upon a time",
    "--ignore-eos",
    "-n",
    "1900",
    "--device",
    "cpu",
    "--num-blocks",
    "160",
)


def begun(spawn):
    """One whose text has begun to come. It is longer than what waits in a pipe, so that it does not
    end while nobody reads."""
    process = spawn(*LONG)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    assert process.stdout.read(1)
    return process


def test_text_arrives_while_it_is_generated_and_ctrl_c_ends_cleanly(spawn):
    process = begun(spawn)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted"


def test_a_reader_that_leaves_is_no_error(spawn):
    process = begun(spawn)
    process.stdout.close()
    assert process.wait(100) == 141
    assert process.stderr.read() == ""
