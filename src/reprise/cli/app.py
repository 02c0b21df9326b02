"""All commands in one tree."""

from __future__ import annotations

from typing import Annotated

import typer

from reprise import __version__
from reprise.cli import chat, generate, serve
from reprise.cli.bench import app as bench
from reprise.cli.doctor import app as doctor

app = typer.Typer(
    name="reprise",
    help="LLM inference whose device graphs are checked before they serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reprise {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """LLM inference whose device graphs are checked before they serve."""


generate.register(app)
serve.register(app)
chat.register(app)
app.add_typer(bench, name="bench")
app.add_typer(doctor, name="doctor")
