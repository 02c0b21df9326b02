"""``reprise bench serve``: how long users of any server wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from reprise.cli import leave_interrupts_to_python
from reprise.cli.bench.shared import AsJson, Seed, print_tables, span
from reprise.cli.command import command
from reprise.cli.failures import EXIT_INTERRUPTED
from reprise.cli.files import output_file

TITLES = {
    "ttft": "first token", "tpot": "each further token", "itl": "between chunks",
    "e2el": "to the end", "late": "sent late by",
}  # fmt: skip
BUSY = 0.8
"""Of a core: a client that needs more may be what is slow."""


def serve(
    base_url: Annotated[str, typer.Option(help="Of the server.", metavar="URL")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m",
            help="As the server calls it. [dim]\\[default: its first one][/dim]",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask for chat completions, in words.")
    ] = False,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests. [dim]\\[default: 200, or as many as the data set has][/dim]",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            help="Take the prompts from this file: JSON objects, one a line, with prompt or "
            "messages, and maybe output_tokens.",
            exists=True, dir_okay=False, metavar="FILE", show_default=False,
        ),
    ] = None,
    input_len_range: Annotated[
        str, typer.Option(help="Tokens of a prompt, uniform.", metavar="LOW[:HIGH]")
    ] = "100:1024",
    output_len_range: Annotated[
        str, typer.Option(help="Tokens to generate, uniform.", metavar="LOW[:HIGH]")
    ] = "100:1024",
    request_rate: Annotated[
        str,
        typer.Option(
            help="Requests a second, or several rates of which each is measured: 1,2,4,inf. inf: "
            "all arrive at once.",
            metavar="RATES",
        ),
    ] = "inf",
    burstiness: Annotated[
        float,
        typer.Option(help="Of the arrivals: 1 is Poisson's process, less has more bursts."),
    ] = 1.0,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests under way at once; others wait.", show_default=False),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos",
            help="Ask for exactly so many tokens, by a field that some servers refuse. Else "
            "answers may end before.",
        ),
    ] = False,
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Prompts are of token ids below it.")
    ] = 256,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="Count requests that keep this: ttft, tpot or e2el, and milliseconds. Repeatable.",
            metavar="NAME:MS",
            show_default=False,
        ),
    ] = None,
    percentiles: Annotated[
        str, typer.Option(help="Of every time.", metavar="LIST")
    ] = "50,90,99",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_API_KEY", help="For the server.", show_default=False),
    ] = None,
    client_processes: Annotated[
        int,
        typer.Option(min=1, help="Processes that send requests, where one would be what is slow."),
    ] = 1,
    seed: Seed = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Write the distributions to this SVG file.", dir_okay=False, writable=True,
            callback=output_file, metavar="FILE", show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure how long users of a server wait, under a load of streamed requests.

    Any server will do that has OpenAI's completions or chat completions. Ctrl-C prints what there
    is.
    """
    limits = dict(_limit(each) for each in goodput or ())
    rates = [_rate(each) for each in request_rate.split(",")]
    wanted = tuple(_decimal("--percentiles", each) for each in percentiles.split(","))

    from reprise.bench.endpoint import Endpoint
    from reprise.bench.serve import serve as measure
    from reprise.bench.work import ServeWork

    endpoint = Endpoint(
        base_url, chat=chat, model=model, api_key=api_key,
        fields={"ignore_eos": True} if ignore_eos else {},
    )  # fmt: skip
    work = ServeWork(
        num_prompts, _span(input_len_range), _span(output_len_range), burstiness, max_concurrency,
        vocab_size, limits, wanted, seed, dataset,
    )  # fmt: skip
    leave_interrupts_to_python()
    record, times = measure(endpoint, work, rates, client_processes)
    if plot is not None:
        from reprise.bench.distributions import plot_distributions

        plot.write_text(plot_distributions(record, times), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(record))
    else:
        _show(record)
        if plot is not None:
            typer.echo(f"written to {plot}", err=True)
    if record["interrupted"]:
        typer.secho("interrupted: requests that were under way count nowhere", err=True, dim=True)
        raise SystemExit(EXIT_INTERRUPTED)


def _show(record: dict[str, Any]) -> None:
    tables: list[list[tuple[Any, ...]]] = [
        [
            ("rate", "done", "failed", "seconds", "req/s", "out tok/s", "all tok/s",
             "good/s"),
            *(
                (_rate_name(each), each["completed"], each["failed"], each["seconds"],
                 each["requests_per_s"], each["output_tokens_per_s"], each["total_tokens_per_s"],
                 each["goodput_requests_per_s"])
                for each in record["results"]
            ),
        ]
    ]  # fmt: skip
    for each in record["results"]:
        named = {name: each[f"{name}_ms"] for name in TITLES}
        columns: list[str] = list(next(filter(None, named.values()), ()))
        tables.append([
            (f"ms at {_rate_name(each)}/s", *columns),
            *((TITLES[name], *(found or dict.fromkeys(columns)).values())
              for name, found in named.items()),
        ])  # fmt: skip
    load = f"{record['num_prompts']} requests to {record['base_url']}{record['endpoint']}"
    print_tables(f"[bold]serve[/]: {load} ({record['model']})", *tables)
    for each in record["results"]:
        for kind, failed in each["failures"].items():
            typer.echo(f"{failed['count']} failed ({kind}), first: {failed['first']}", err=True)
        if each["client_busy"] > BUSY:
            typer.echo(
                f"the client kept {each['client_busy']:.0%} of a core busy at "
                f"{_rate_name(each)} requests/s: it may be what was slow (--client-processes)",
                err=True,
            )  # fmt: skip


def _span(text: str) -> tuple[int, int]:
    return span(text if ":" in text else f"{text}:{text}")


def _rate_name(result: dict[str, Any]) -> str:
    return "inf" if result["request_rate"] is None else f"{result['request_rate']:g}"


def _rate(text: str) -> float | None:
    return None if text.strip() == "inf" else _decimal("--request-rate", text)


def _decimal(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{flag}: {text!r} is no number") from None


def _limit(text: str) -> tuple[str, float]:
    name, colon, most = text.partition(":")
    if not colon:
        raise typer.BadParameter(f"--goodput: {text!r} must be NAME:MS, such as ttft:300")
    return name, _decimal("--goodput", most)


def register(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "serve", serve)
