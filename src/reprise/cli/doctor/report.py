"""``reprise doctor report``: one file for a bug report, without anything private."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from reprise.cli.command import command
from reprise.cli.files import output_file
from reprise.cli.options import ONE_ENGINE, engine_options


def _json_file(path: Path | None) -> Path | None:
    """As :func:`output_file`, with a name that says what it is."""
    if path is not None and path.suffix != ".json":
        raise typer.BadParameter(f"{str(path)!r}: give a name that ends in .json")
    return output_file(path)


def report(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the report to this file instead of printing it.",
            dir_okay=False,
            callback=_json_file,
            metavar="FILE.json",
        ),
    ] = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Collect what a bug report needs: versions, device, plan, ops, graphs, log.

    Starts an engine with the given options and completes a few random prompts. The report has no
    prompts, no texts, and of your directories only the last part of a model's. If the engine
    fails, the report tells how, and the exit status is that of the failure.
    """
    from reprise.config import EngineConfig
    from reprise.doctor.report import bug_report, kept_log, made_up_steps
    from reprise.llm import LLM

    config = EngineConfig(**engine)
    running, steps = None, None
    with kept_log() as log:
        try:
            running = LLM(**engine).engine
            steps = made_up_steps(running)
        except Exception as error:
            _write(bug_report(running, config, failure=error, log=log), output)
            raise
        _write(bug_report(running, log=log, steps=steps), output)


def _write(found: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(found, indent=1, allow_nan=False)
    if output is None:
        typer.echo(text)
        return
    output.write_text(text + "\n", encoding="utf-8")
    typer.echo(f"report written to {output}")


def register(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "report", report, engine=engine_options(*ONE_ENGINE))
