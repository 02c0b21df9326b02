"""``reprise bench latency``: the time of a decode step, and the time to first token."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from reprise.bench.presets import LATENCY, LatencyWork
from reprise.cli.bench.shared import (
    AsJson,
    Model,
    Repeats,
    Seed,
    Trace,
    bench_engine_options,
    numbers,
    print_record,
    rows,
)
from reprise.cli.command import command
from reprise.cli.fields import choice
from reprise.cli.options import ONE_ENGINE

Workload = choice("LatencyWorkload", tuple(LATENCY))


def latency(
    model: Model = None,
    workload: Annotated[
        Workload | None,  # type: ignore[valid-type]
        typer.Option(help="A named workload; further options change it.", show_default=False),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="Requests at the same time; several: 1,64. [dim]\\[default: 1][/dim]",
            metavar="N[,N...]",
            show_default=False,
        ),
    ] = None,
    input_len: Annotated[
        str | None,
        typer.Option(
            help="Tokens of each prompt; several: 128,1024. [dim]\\[default: 128][/dim]",
            metavar="N[,N...]",
            show_default=False,
        ),
    ] = None,
    output_lens: Annotated[
        str | None,
        typer.Option(
            help="The two output lengths between which a step's time is the slope. "
            "[dim]\\[default: 32,288 for one request, 16,144 for more][/dim]",
            metavar="SHORT,LONG",
            show_default=False,
        ),
    ] = None,
    synthetic_acceptance: Annotated[
        float | None,
        typer.Option(
            help="Let each draft count with this chance, whatever it is: times of drafts that are "
            "yet to be had. How many are drafted says --speculative-config, else 3; a model that "
            "it names is computed. What is generated means nothing, and every output says so.",
            metavar="CHANCE",
            min=0.0,
            max=1.0,
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
    """Measure the time of a decode step and the time to first token.

    A step's time is the slope between a short and a long output, so that prefill cancels out. The
    floor beside it is the time to read the weights and the context once, at the best bandwidth
    measured in the same run. The prefill share is of the rate of a large matrix product, likewise.
    """
    work = LatencyWork() if workload is None else LATENCY[workload.value]
    changes: dict[str, Any] = {
        "model": model,
        "batch_sizes": None if batch_size is None else numbers(batch_size),
        "input_lens": None if input_len is None else numbers(input_len),
        "output_lens": None if output_lens is None else numbers(output_lens),
    }
    if output_lens is not None and len(changes["output_lens"]) != 2:
        raise typer.BadParameter(f"{output_lens!r}: give two lengths, such as 32,288")
    work = replace(work, **{name: value for name, value in changes.items() if value is not None})

    if synthetic_acceptance is not None:
        given = {**work.engine, **engine}.get("speculative_config") or {}
        computed = given if "model" in given else {"method": "synthetic"}
        engine["speculative_config"] = {
            **computed,
            "num_speculative_tokens": given.get("num_speculative_tokens", 3),
            "synthetic_acceptance": synthetic_acceptance,
        }

    from reprise.bench.latency import latency as measure

    record = measure(work, engine, repeats, seed, trace)
    results = record["results"]
    decode = {
        "batch": "batch_size",
        "input": "input_len",
        "ms/step": "ms_per_step",
        "host ms": "host_ms_per_step",
        "floor ms": "floor_ms",
        "x floor": "times_floor",
        **({"tok/step": "tokens_per_step"} if record["engine"]["speculative_config"] else {}),
        "out tok/s": "tokens_per_s",
    }
    prefill = {
        "batch": "batch_size",
        "input": "input_len",
        "first token ms": "first_token_ms",
        "prefill tok/s": "prefill_tokens_per_s",
    }
    shares = [f"{each['prefill_share_of_matmul_rate']:.1%}" for each in results]
    firsts = rows(results, prefill)
    print_record(
        record,
        as_json,
        rows(results, decode),
        [
            (*firsts[0], "prefill share"),
            *((*a, b) for a, b in zip(firsts[1:], shares, strict=True)),
        ],
    )


def register(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "latency", latency, engine=bench_engine_options(*ONE_ENGINE))
