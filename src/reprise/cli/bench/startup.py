"""``reprise bench startup``: from the start of a process to its first token."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reprise.cli.bench.shared import AsJson, Model, Repeats, bench_engine_options, print_record
from reprise.cli.command import command
from reprise.cli.options import ONE_ENGINE


def startup(
    model: Model = None,
    repeats: Repeats = 3,
    cold: Annotated[
        bool, typer.Option("--cold", help="Start each process with an empty kernel cache.")
    ] = False,
    as_json: AsJson = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Measure the parts of a start, from a new process to its first token."""
    from reprise.bench.startup import startup as measure

    record = measure(model, engine, repeats, cold)
    rows: list[tuple[Any, ...]] = [("part", "seconds")]
    rows += list(record["parts"].items())
    rows += [("start to ready", record["ready_seconds"])]
    rows += [("start to first token", record["first_token_seconds"])]
    print_record(record, as_json, rows)


def register(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "startup", startup, engine=bench_engine_options(*ONE_ENGINE))
