"""The core works without the packages of the extra, and the command says what to install."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from reprise.cli.serve import PACKAGES


@pytest.mark.parametrize(
    "modules",
    ["reprise.cli.app", pytest.param("reprise.llm, reprise.async_llm", marks=pytest.mark.long)],
)
def test_the_core_imports_none_of_them(modules: str) -> None:
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {(*PACKAGES, 'starlette')!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"import {modules}\n"
        "sys.argv = ['reprise', 'serve', '--help']\n"
        "from reprise.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-num-queued-reqs" in done.stdout


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from reprise.cli.app import app

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvloop" else find(name)
    )
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 2
    assert "needs uvloop: pip install 'reprise[server]'" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--port", "99999"), "--port=99999"),
        (("--ssl-keyfile", "/nowhere"), "--ssl-certfile"),
        (("--allowed-origins", "*", "--allow-credentials"), "name the origins"),
        (("--chat-template", "/nowhere.jinja"), "--chat-template='/nowhere.jinja'"),
        (("--override-generation-config", '{"temperature": -1}'), "temperature=-1"),
        (("--override-generation-config", '{"temprature": 1}'), "temprature"),
        (("--override-generation-config", '{"n": 2}'), "n=2: each request says it"),
        (("--override-generation-config", '{"logprobs": 0}'), "logprobs=0: each request says it"),
        (("--reasoning-parser", "nonsense"), "--reasoning-parser='nonsense'"),
        (("demo", "--model", "other"), "contradict"),
    ],
)
def test_wrong_options_are_told_at_once(arguments: tuple[str, ...], told: str) -> None:
    from reprise.cli.app import app

    result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())
