"""What the benchmarks' commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reprise.bench.presets import DEFAULT_MODEL, model_names
from reprise.cli.fields import FieldOptions
from reprise.cli.files import output_file
from reprise.cli.options import engine_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

KERNEL_WIDTH = 40
"""Longer names of kernels are cut in tables; JSON has them whole."""

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON, not a table.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help=f"Directory, Hugging Face id, or a config with random weights: "
        f"{', '.join(model_names())}. [dim]\\[default: {DEFAULT_MODEL}][/dim]",
        show_default=False,
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Runs; the figures are medians over them.")]
Seed = Annotated[int, typer.Option(help="Of the random prompts.")]


def _trace_file(path: Path | None) -> Path | None:
    """As :func:`output_file`, with a name that the profiler understands."""
    if path is not None and not path.name.endswith((".json", ".json.gz")):
        raise typer.BadParameter(f"{str(path)!r}: give a name that ends in .json or .json.gz")
    return output_file(path)


Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        help="Afterwards record 20 decode steps of the largest batch and longest prompts, write "
        "them to this file (.json or .json.gz) for Perfetto or chrome://tracing, and report how "
        "busy the device was and with which kernels. Recording slows the host, so the report is of "
        "20 other steps with only the device recorded: trust its idle share, not the file's gaps.",
        dir_okay=False,
        writable=True,
        callback=_trace_file,
        metavar="FILE",
        show_default=False,
    ),
]


def bench_engine_options(*omit: str) -> FieldOptions:
    """The engine's options, with the defaults that suit measuring.

    Args:
        *omit: Fields that the command has no use for.
    """
    return engine_options("model", "tokenizer", "skip_tokenizer_init", "seed", *omit,
                          enable_prefix_caching=False)  # fmt: skip


def numbers(text: str) -> tuple[int, ...]:
    """Parse ``1,64``.

    Raises:
        typer.BadParameter: Not a list of positive whole numbers.
    """
    parts = text.split(",")
    if not all(each.strip().isdecimal() and int(each) > 0 for each in parts):
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers, such as 1,64")
    return tuple(int(each) for each in parts)


def span(text: str) -> tuple[int, int]:
    """Parse ``100:1024``.

    Raises:
        typer.BadParameter: Not two positive whole numbers in order.
    """
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high)):
        raise typer.BadParameter(f"{text!r} is not a range LOW:HIGH, such as 100:1024")
    return int(low), int(high)


def rows(results: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[tuple[Any, ...]]:
    """A table: the headings, then a row for each of ``results``; ``columns``: heading to key."""
    return [tuple(columns), *(tuple(each[key] for key in columns.values()) for each in results)]


def print_record(record: dict[str, Any], as_json: bool, *tables: Sequence[tuple[Any, ...]]) -> None:
    """Print it to standard output.

    Args:
        record: All figures.
        as_json: One line; ``tables`` are not shown.
        *tables: The first row of each holds the headings.
    """
    if as_json:
        import json

        typer.echo(json.dumps(record))
        return
    facts = f"{record['model']} ({record['load_format']} weights, {record['dtype']})"
    console = _console()
    console.print(f"[bold]{record['benchmark']}[/]: {facts} on {record['device_name']}")
    synthetic = record.get("synthetic_acceptance")
    if synthetic is not None:
        console.print(
            f"[bold red]SYNTHETIC[/]: each draft counts with a chance of {synthetic:g}, whatever "
            "it is. The times are those of such drafts; no text was made that means anything."
        )
    for each in tables:
        console.print(_table(each))
    if "drafts" in record:
        found = record["drafts"]
        console.print(
            f"drafts: acceptance length {found['acceptance_length']}, {found['accepted']} of "
            f"{found['drafted']} drafted tokens counted"
        )
    if "trace" in record:
        _print_trace(console, record["trace"])
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    console.print(f"[dim]medians of {record['repeats']}; {known}; {record['date']}[/]")


def print_tables(title: str, *tables: Sequence[tuple[Any, ...]]) -> None:
    """Print them to standard output; the first row of each holds the headings."""
    console = _console()
    console.print(title)
    for each in tables:
        console.print(_table(each))


def _console() -> Console:
    """A console whose tables are never cut, even where the terminal is narrow."""
    from rich.console import Console

    return Console(width=max(80, Console().width))


def _table(rows: Sequence[tuple[Any, ...]]) -> Table:
    """The first row holds the headings."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD)
    for index, heading in enumerate(rows[0]):
        made.add_column(str(heading), justify="left" if index == 0 else "right")
    for row in rows[1:]:
        made.add_row(*(Text("-" if each is None else str(each)) for each in row))
    return made


def _print_trace(console: Console, trace: dict[str, Any]) -> None:
    about = f"{trace['steps']} steps of {trace['batch_size']} requests at {trace['context']} tokens"
    if trace["kernels"] is None:
        console.print(f"[bold]trace[/]: {about}; no work on a device was recorded")
    else:
        console.print(
            f"[bold]trace[/]: {about}, {trace['ms_per_step']} ms a step, of which the device was "
            f"busy for {trace['device_busy_ms']} ms (idle: {trace['device_idle_share']:.1%})"
        )
        kernels: list[tuple[Any, ...]] = [("kernel", "a step", "us/step", "share")]
        for each in trace["kernels"]:
            name = each["name"]
            if len(name) > KERNEL_WIDTH:
                name = f"{name[: KERNEL_WIDTH - 1]}…"
            kernels.append(
                (name, each["count_per_step"], each["us_per_step"], f"{each['share']:.1%}")
            )
        console.print(_table(kernels))
    console.print(f"written to {trace['file']}", style="dim", markup=False)
