"""What a process of its own says and leaves with when something fails."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import warm

from reprise.cli import failures

FULL = Path("/dev/full")
GENERATE = "generate x -n 2 -q --device cpu --num-blocks 160"


def reprise(
    line: str, environment: Mapping[str, str] | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``reprise LINE`` as a shell does, with streams as they are given."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(
        [sys.executable, "-m", "reprise", *shlex.split(line)],
        text=True,
        env={**os.environ, **(environment or {})},
        **{**streams, **how},
    )


def test_an_error_is_one_line_or_with_debug_its_traceback():
    short = reprise("doctor --device nope")
    long = reprise("doctor --device nope --debug")
    assert short.returncode == long.returncode == 2
    assert short.stderr.startswith("error: --device='nope' is unknown")
    assert len(short.stderr.splitlines()) == 1
    assert long.stderr.startswith("Traceback")
    assert "PlatformError: device='nope' is unknown" in long.stderr.splitlines()[-1]
    assert "Exit" not in long.stderr


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("max_model_len=9 exceeds max_position_embeddings=8; lower it",
         "--max-model-len=9 exceeds max_position_embeddings=8; lower it"),
        ("raise max_model_len or the cache", "raise --max-model-len or the cache"),
        ("give skip_tokenizer_init=True", "give --skip-tokenizer-init"),
        ("enable_prefix_caching=False helps", "--no-enable-prefix-caching helps"),
        ("device='x' is no device of this model", "--device='x' is no device of this model"),
        ("/tmp/max_model_len/model=x my_max_model_len max_model_lens",
         "/tmp/max_model_len/model=x my_max_model_len max_model_lens"),
    ],
)  # fmt: skip
def test_errors_speak_of_flags(message, shown):
    names = ("max_model_len", "skip_tokenizer_init", "enable_prefix_caching", "device", "model")
    flags = {name: "--" + name.replace("_", "-") for name in names}
    assert failures.in_flags(message, flags) == shown


def test_ctrl_c_before_a_command_runs():
    """As when it comes while the commands are imported."""
    program = (
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'reprise.cli.app':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from reprise.cli import main\n"
        "main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted"


def test_failures_outside_of_click_leave_with_their_status(capsys):
    with pytest.raises(SystemExit) as left, failures.reported(debug=False):
        raise KeyboardInterrupt
    assert left.value.code == 130
    with pytest.raises(SystemExit) as left, failures.reported(debug=False):
        Path("/nowhere/at/all").read_text()
    assert left.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1] == "error: /nowhere/at/all: No such file or directory"


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("line", ["--help", "doctor --json", GENERATE])
def test_output_that_is_not_taken_is_one_line(line):
    with FULL.open("w") as full:
        result = reprise(line, stdout=full)
    assert result.returncode == 2
    assert result.stderr == "error: No space left on device\n"


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_messages_that_are_not_taken_stop_nothing():
    """As where the disk that the log is on is full."""
    plain = GENERATE.replace(" -q", " --temperature 0")
    with FULL.open("w") as full:
        result = reprise(plain, stderr=full)
        refused = reprise("doctor --device nope", stderr=full)
    assert (result.returncode, result.stdout) == (0, reprise(plain).stdout)
    assert refused.returncode == 2


@pytest.mark.parametrize("closed", [">&-", "<&-", "<&- >&-", ""])
def test_children_have_three_streams_whatever_was_closed(closed):
    """The first connection that a child gets would be its standard output."""
    child = "import os; open(os.devnull).fileno() > 2 and os.write(2, b'three')"
    program = (
        "import subprocess, sys; from reprise.cli import _mend_streams; _mend_streams(); "
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    result = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, program],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "three")


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_streams_are_empty_ones(closed):
    result = reprise(GENERATE, preexec_fn=warm.WITHOUT[closed])
    assert result.returncode == 0
    assert result.stderr == ""
    assert bool(result.stdout) is (closed != 1)


def test_a_chat_without_input_ends():
    result = reprise("chat --device cpu --num-blocks 160", preexec_fn=warm.WITHOUT[0])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_characters_that_the_terminal_lacks_are_replaced():
    result = reprise("doctor conformance --device cpu --only streams_order_work",
                     {"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "? conforms" in result.stdout


def test_input_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "input").write_bytes(b"a\xffb")
    with (tmp_path / "input").open() as read:
        result = reprise("generate - --device cpu --num-blocks 160", stdin=read)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "is not valid text" in result.stderr
