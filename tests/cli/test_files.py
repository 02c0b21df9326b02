"""Options that name a file to write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from reprise.cli.files import output_file


def test_a_trial_leaves_nothing_behind(tmp_path):
    new, old, link = tmp_path / "new", tmp_path / "old", tmp_path / "link"
    old.write_text("kept")
    link.symlink_to(tmp_path / "target")
    for path in (new, old, link):
        assert output_file(path) == path
    assert output_file(None) is None
    assert sorted(tmp_path.iterdir()) == [link, old]
    assert old.read_text() == "kept"


def test_a_pipe_is_not_opened_for_a_trial(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert output_file(tmp_path / "pipe") == tmp_path / "pipe"


@pytest.mark.parametrize("name", ["no/such/directory", "x" * 300])
def test_what_cannot_be_written_is_refused(tmp_path, name):
    with pytest.raises(typer.BadParameter):
        output_file(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "graphs", "--html", "nowhere/x.html"),
        ("doctor", "graphs", "--html", "nowhere/at/all/x.html"),
        ("bench", "latency", "--trace", "link.json"),
    ],
)
def test_options_are_refused_before_any_work(invoke, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link.json").symlink_to("nowhere/x.json")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert result.stdout == ""
