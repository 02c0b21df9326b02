"""``reprise bench throughput``: output tokens a second with many requests at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from reprise.bench.presets import THROUGHPUT, ThroughputWork
from reprise.cli.bench.shared import (
    AsJson,
    Model,
    Repeats,
    Seed,
    Trace,
    bench_engine_options,
    print_record,
    rows,
    span,
)
from reprise.cli.command import command
from reprise.cli.fields import choice

Workload = choice("ThroughputWorkload", tuple(THROUGHPUT))


def throughput(
    model: Model = None,
    workload: Annotated[
        Workload | None,  # type: ignore[valid-type]
        typer.Option(help="A named workload; further options change it.", show_default=False),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(min=1, help="Requests. [dim]\\[default: 256][/dim]", show_default=False),
    ] = None,
    input_len_range: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a prompt, uniform. [dim]\\[default: 100:1024][/dim]",
            metavar="LOW:HIGH",
            show_default=False,
        ),
    ] = None,
    output_len_range: Annotated[
        str | None,
        typer.Option(
            help="Tokens to generate, uniform. [dim]\\[default: 100:1024][/dim]",
            metavar="LOW:HIGH",
            show_default=False,
        ),
    ] = None,
    repeats: Repeats = 3,
    seed: Seed = 0,
    trace: Trace = None,
    as_json: AsJson = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Measure output tokens a second with many requests of random lengths at once."""
    work = ThroughputWork() if workload is None else THROUGHPUT[workload.value]
    changes: dict[str, Any] = {
        "model": model,
        "num_prompts": num_prompts,
        "input_len_range": None if input_len_range is None else span(input_len_range),
        "output_len_range": None if output_len_range is None else span(output_len_range),
    }
    work = replace(work, **{name: value for name, value in changes.items() if value is not None})

    if engine.get("data_parallel_size", 1) > 1:
        _of_replicas(work, engine, repeats, seed, trace, as_json)
        return

    from reprise.bench.throughput import throughput as measure

    record = measure(work, engine, repeats, seed, trace)
    columns = {
        "requests": "requests",
        "seconds": "seconds",
        "out tok/s": "output_tokens_per_s",
        "all tok/s": "total_tokens_per_s",
        "requests/s": "requests_per_s",
        "steps": "steps",
        "waiting": "waiting",
        "preemptions": "preemptions",
    }
    tables: list[list[tuple[Any, ...]]] = [
        [tuple(columns), tuple(record[k] for k in columns.values())],
        _bounds(record),
    ]
    if record["where"] is not None:
        tables.append(_where(record["where"]))
    print_record(record, as_json, *tables)


def _of_replicas(
    work: ThroughputWork,
    engine: dict[str, Any],
    repeats: int,
    seed: int,
    trace: Path | None,
    as_json: bool,
) -> None:
    from reprise.bench.replicas import throughput as measure

    if trace is not None:
        raise typer.BadParameter("--trace records one engine: leave out --data-parallel-size")
    record = measure(work, engine, repeats, seed)
    columns = {
        "requests": "requests", "seconds": "seconds", "out tok/s": "output_tokens_per_s",
        "all tok/s": "total_tokens_per_s", "requests/s": "requests_per_s",
    }  # fmt: skip
    of_each = ("replica", "device", "steps", "output_tokens", "preemptions", "replays")
    print_record(
        record,
        as_json,
        [tuple(columns), tuple(record[k] for k in columns.values())],
        rows(record["replicas"], {each.replace("_", " "): each for each in of_each}),
    )


def _bounds(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    bound = record["bound"]
    return [
        ("bound", "seconds", "out tok/s", "measured is"),
        *(
            (name, bound[f"{key}_seconds"], bound[f"{key}_tokens_per_s"],
             None if bound[f"times_{key}"] is None else f"{bound[f'times_{key}']} x")
            for name, key in (("of this schedule", "schedule"), ("of any schedule", "any"))
        ),
    ]  # fmt: skip


def _where(where: dict[str, float]) -> list[tuple[Any, ...]]:
    total = sum(each for name, each in where.items() if name != "tail")
    names = {"small": "small kernels", "tail": "of these, the tail"}
    return [
        ("where it goes", "seconds", "share"),
        *((names.get(k, k), v, f"{v / total:.1%}") for k, v in where.items()),
    ]


def register(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "throughput", throughput, engine=bench_engine_options())
