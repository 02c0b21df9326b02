"""What the benchmarks' commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from reprise.bench.presets import model_names
from reprise.cli.fields import FieldOptions
from reprise.cli.options import engine_options

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON, not a table.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help=f"Directory, Hugging Face id, or a config with random weights: "
        f"{', '.join(model_names())}.",
        show_default=False,
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Runs; the figures are medians over them.")]
Seed = Annotated[int, typer.Option(help="Of the random prompts.")]


def bench_engine_options() -> FieldOptions:
    """The engine's options, with the defaults that suit measuring."""
    return engine_options("model", "tokenizer", "skip_tokenizer_init", "seed",
                          enable_prefix_caching=False)  # fmt: skip


def numbers(text: str) -> tuple[int, ...]:
    """Parse ``1,64``.

    Raises:
        typer.BadParameter: Not a list of positive whole numbers.
    """
    parts = text.split(",")
    if not all(each.strip().isdigit() and int(each) > 0 for each in parts):
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers, such as 1,64")
    return tuple(int(each) for each in parts)


def span(text: str) -> tuple[int, int]:
    """Parse ``100:1024``.

    Raises:
        typer.BadParameter: Not two positive whole numbers in order.
    """
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and 0 < int(low) <= int(high)):
        raise typer.BadParameter(f"{text!r} is not a range LOW:HIGH, such as 100:1024")
    return int(low), int(high)


def print_record(record: dict[str, Any], as_json: bool, rows: Sequence[tuple[Any, ...]]) -> None:
    """To standard output.

    Args:
        record: All figures.
        as_json: One line; ``rows`` are not shown.
        rows: The first holds the headings of a table.
    """
    if as_json:
        import json

        typer.echo(json.dumps(record))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = f"{record['model']} ({record['load_format']} weights, {record['dtype']})"
    console.print(f"[bold]{record['benchmark']}[/]: {facts} on {record['device_name']}")
    made = Table(box=box.SIMPLE_HEAD)
    for index, heading in enumerate(rows[0]):
        made.add_column(str(heading), justify="left" if index == 0 else "right")
    for row in rows[1:]:
        made.add_row(*("-" if each is None else str(each) for each in row))
    console.print(made)
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    console.print(f"[dim]medians of {record['repeats']}; {known}; {record['date']}[/]")
