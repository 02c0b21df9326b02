"""docs/why.md: its commands are those of ``make why``, they parse, and cheap ones run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "why.md").read_text(encoding="utf-8")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


why = load(ROOT / "tools" / "why.py")
COMMANDS = why.commands(PAGE)


def test_make_why_runs_every_command_of_the_page():
    lines = [each[2:] for each in PAGE.replace("\\\n", " ").splitlines() if each.startswith("$ ")]
    assert [" ".join(each.arguments) for each in COMMANDS] == [
        re.sub(r"'([^']*)'", r"\1", each) for each in lines
    ]
    recipe = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", "why"], cwd=ROOT, capture_output=True, text=True
    )
    assert recipe.returncode == 0, recipe.stderr
    assert "tools/why.py" in recipe.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_parses(command):
    from reprise.cli.app import app

    arguments = list(command.argv[command.argv[:3].count("-m") * 2 + 1 :])
    if arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file()
        options = [each for each in arguments[1:] if not each.startswith("none,")]
        arguments = ["bench", "latency", *(each for each in options if each != "--modes")]
    found = typer.main.get_command(app)
    while arguments and not arguments[0].startswith("-"):
        found = found.commands[arguments.pop(0)]
    with found.make_context("reprise", arguments) as made:
        assert not made.args


def test_every_row_leads_to_a_section_with_a_command():
    for anchor in re.findall(r"\]\(#([a-z-]+)\)", PAGE):
        (title,) = (
            each for each in re.findall(r"^## (.*)$", PAGE, re.M)
            if re.sub(r"[^a-z -]", "", each.lower()).replace(" ", "-") == anchor
        )  # fmt: skip
        assert "```console" in PAGE.split(f"## {title}")[1].split("\n## ")[0]


def test_a_failing_command_fails_the_whole(monkeypatch, tmp_path, capfd):
    """Commands behind ``!`` must fail, all others must not; the rest runs all the same."""
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "```console\n"
        "$ reprise generate --nowhere\n"
        "$ ! python -c 'raise SystemExit(1)'\n"
        "$ ! python -c 'print(1)'\n"
        "$ python -c 'print(40 + 2)'  # the answer\n"
        "```\n```console device\n$ python -c 'print(6 * 9)'\n```\n"
    )
    monkeypatch.setattr(why, "PAGE", page)
    assert why.main() == 1
    out = capfd.readouterr().out
    failed = out.split("failed:")[1]
    assert "nowhere" in failed
    assert "print(1)" in failed
    assert "SystemExit" not in failed
    assert "42" in out
    page.write_text("```console\n$ python -c 'print(40 + 2)'\n```\n")
    assert why.main() == 0


def test_only_commands_stand_in_console_blocks():
    with pytest.raises(ValueError, match="behind"):
        why.commands("```console\nreprise doctor\n```\n")
    with pytest.raises(ValueError, match="neither reprise nor python"):
        _ = why.commands("```console\n$ rm file\n```\n")[0].argv
