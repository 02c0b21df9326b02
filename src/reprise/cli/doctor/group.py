"""The command group, and what its reports share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    help="Show what this machine offers and what Reprise makes of it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of tables.")]


def print_json(value: Any) -> None:
    """Print it as one line on standard output."""
    import json

    typer.echo(json.dumps(value))


def table(title: str, *columns: str) -> Table:
    """An empty table in the style of all reports."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for each in columns:
        made.add_column(each, overflow="fold")
    return made
