"""Options made from dataclass fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from reprise.cli.command import command
from reprise.cli.fields import FieldOptions, Special, whole_number
from reprise.cli.options import engine_options


@dataclass
class Sample:
    name: str | None = None
    """A name; None: none."""
    mode: Literal["slow", "fast"] = "slow"
    """How."""
    size: int = 3
    """How much."""
    caching: bool = True
    """Keep it."""
    verbose: bool = False
    """Say more."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further settings."""
    tags: tuple[str, ...] = ()
    """Words."""


@pytest.fixture
def parse():
    """Arguments to what the command gets, or the output if it did not run."""
    app = typer.Typer()
    seen: list[dict[str, Any]] = []

    def show(*, sample: dict[str, Any]) -> None:
        seen.append(sample)

    special = {"tags": Special(flags=("--tag",), parse=str.upper, repeated=True)}
    command(app, "show", show, sample=FieldOptions(Sample, special=special))

    def run(*arguments: str) -> Any:
        seen.clear()
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "150"})
        return seen[0] if seen else result.output

    return run


def test_only_what_was_given_is_passed_on(parse):
    assert parse() == {}


def test_each_kind_of_field(parse):
    assert parse("--name", "x", "--mode", "fast", "--size", "5") == {
        "name": "x",
        "mode": "fast",
        "size": 5,
    }
    assert parse("--more", '{"a": [1]}') == {"more": {"a": [1]}}
    assert parse("--tag", "a", "--tag", "b") == {"tags": ["A", "B"]}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4096", 4096), ("-1", -1), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500),
        ("25.6m", 25_600_000), ("2M", 2 << 20), ("24G", 24 << 30), ("1.5g", 1_500_000_000),
        ("0.25t", 250_000_000_000),
    ],
)  # fmt: skip
def test_numbers_as_vllm_takes_them(text: str, number: int) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize("text", ["", "K", "32 K", "1.5K", "1.5", "1.2345k", "32KB", "1e3", "٣"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="no whole number: give one such as 32768, 32K"):
        whole_number(text)


def test_lengths_and_bytes_of_an_engine_take_units() -> None:
    app = typer.Typer()
    seen: list[dict[str, Any]] = []
    command(app, "show", lambda *, engine: seen.append(engine), engine=engine_options())
    flags = ("--max-model-len", "32K", "--max-num-batched-tokens=8k", "--kv-cache-memory-bytes=2G")
    CliRunner().invoke(app, flags)
    assert seen == [
        {
            "max_model_len": 32_768, "max_num_batched_tokens": 8000,
            "kv_cache_memory_bytes": 2 << 30,
        }
    ]  # fmt: skip
    CliRunner().invoke(app, ["--max-model-len", "auto"])
    assert seen[1:] == [{"max_model_len": "auto"}]


def test_what_a_command_does_not_take_is_refused_with_the_remedy() -> None:
    app = typer.Typer()
    seen: list[dict[str, Any]] = []
    options = FieldOptions(Sample, omit=frozenset({"size"}), refused={"size": "leave it out"})
    command(app, "show", lambda *, sample: seen.append(sample), sample=options)
    result = CliRunner().invoke(app, ["--size", "2"], env={"COLUMNS": "150"})
    assert result.exit_code == 2
    assert "--size is not supported here; leave it out" in result.output
    assert "--size" not in CliRunner().invoke(app, ["--help"]).output
    assert not seen
    assert CliRunner().invoke(app, ["--name", "x"]).exit_code == 0
    assert seen == [{"name": "x"}]


def test_switches_go_both_ways(parse):
    assert parse("--no-caching", "--verbose") == {"caching": False, "verbose": True}
    assert parse("--caching", "--no-verbose") == {"caching": True, "verbose": False}


def test_the_help_shows_documentation_defaults_and_the_useful_side_of_a_switch(parse):
    text = parse("--help")
    assert "A name; default: none." in text
    assert "How much. [default: 3]" in text
    assert "--no-caching" in text
    assert "--no-verbose" not in text
