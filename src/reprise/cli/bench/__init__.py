"""``reprise bench``: figures, as a table or as one line of JSON."""

from __future__ import annotations

import typer

from reprise.cli.bench import latency, startup, throughput

app = typer.Typer(
    help="Measure latency, throughput and start-up.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _each in (latency, throughput, startup):
    _each.register(app)

__all__ = ["app"]
