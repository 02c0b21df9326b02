"""``reprise bench``: figures, as a table or as one line of JSON."""

from __future__ import annotations

import os

import typer

from reprise.cli.bench import latency, serve, startup, throughput

app = typer.Typer(
    help="Measure latency, throughput, start-up and servers.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def quieten() -> None:
    # The profiler's library reads it when torch is imported. Its lines are no figures.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


for _each in (latency, throughput, startup, serve):
    _each.register(app)

__all__ = ["app"]
