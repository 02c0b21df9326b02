"""``reprise doctor conformance``: does this platform keep its contract, and compute a model?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from reprise.cli.command import command
from reprise.cli.doctor.group import AsJson, print_json, table
from reprise.cli.fields import FieldOptions
from reprise.cli.options import ENGINE_PANELS, ENGINE_SPECIAL
from reprise.config import EngineConfig
from reprise.errors import ConfigError

if TYPE_CHECKING:
    from reprise.doctor.conformance import Conformance

EXIT_FAILED = 1
MODEL_OPTIONS = (
    "model", "revision", "dtype", "load_format", "hf_overrides", "max_model_len", "ops", "seed",
)  # fmt: skip
STYLES = {"pass": "[green]pass[/]", "fail": "[bold white on red] FAIL [/]", "skip": "[dim]skip[/]"}


def conformance(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Contracts to try, by name or group, with * and ?; repeatable.", metavar="PATTERN"
        ),
    ] = None,
    as_json: AsJson = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the text of the contracts and try nothing.")
    ] = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Try every contract that a platform must keep; exit with status 1 if one is broken.

    With --model, run that model instead, and compare each call of each op in each layer with the
    op's reference on the same inputs.
    """
    if "model" in engine:
        if only or explain:
            raise ConfigError(
                "--only and --explain are about contracts; leave them out with --model"
            )
        _compare_model(as_json, engine)
        return
    beside = [each for each in engine if each != "device"]
    if beside:
        given = ", ".join(f"{each}={engine[each]}" for each in beside)
        raise ConfigError(f"{given}: only with --model; contracts are tried on the demo model")
    _try_contracts(engine.get("device", "auto"), only, as_json, explain)


def _compare_model(as_json: bool, engine: dict[str, Any]) -> None:
    from reprise import LLM
    from reprise.bench.record import engine_facts, heading
    from reprise.doctor.conformance.layers import compare_with_references, small_engine
    from reprise.progress import progress

    llm = LLM(**small_engine(engine))
    facts = {
        **heading("doctor conformance --model"),
        **engine_facts(engine["model"], llm.engine),
    }
    with progress("compare", 0) as bar:
        report = compare_with_references(llm.engine.runner, facts, bar.show)
    if as_json:
        print_json(report.to_dict())
    else:
        from reprise.cli.doctor.layers_table import show

        show(report)
    if report.wrong:
        raise typer.Exit(EXIT_FAILED)


def _try_contracts(device: str, only: list[str] | None, as_json: bool, explain: bool) -> None:
    from reprise.bench.record import heading, versions
    from reprise.doctor import conformance as kit
    from reprise.progress import progress

    chosen = kit.select(only or ())
    if not chosen:
        names = ", ".join(kit.CONTRACTS)
        raise ConfigError(f"--only {' '.join(only or ())}: no such contract; known: {names}")
    if explain:
        for each in chosen:
            typer.echo(f"{each.name} ({each.group})\n  {each.summary}")
            for line in each.explanation.splitlines():
                typer.echo(f"  {line}".rstrip())
            typer.echo()
        return
    facts = {**heading("doctor conformance"), "versions": versions()}
    with progress("conformance", len(chosen)) as bar:
        report = kit.conformance(device, facts, chosen, bar.show)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    if report.failed:
        raise typer.Exit(EXIT_FAILED)


def _show(report: Conformance) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    facts = report.facts
    made = table(
        f"Conformance of {facts['platform']} ({facts['device_name']})",
        "contract", "verdict", "detail", "seconds",
    )  # fmt: skip
    made.columns[0].no_wrap = True
    made.columns[3].justify = "right"
    group = ""
    for each in report.outcomes:
        if each.group != group and group:
            made.add_section()
        group = each.group
        detail = escape(each.detail)
        if each.verdict == "fail":
            detail = f"{escape(each.summary)}\n[red]{detail}[/]"
        elif each.verdict == "skip":
            detail = f"[dim]skipped: {detail}[/]"
        made.add_row(each.name, STYLES[each.verdict], detail, f"{each.seconds:.2f}")
    console.print(made)
    counts = ", ".join(f"{report.count(each)} {each}" for each in ("pass", "fail", "skip"))
    if report.failed:
        names = ", ".join(each.name for each in report.failed)
        console.print(f"[bold red]✗ does not conform[/] ({counts}): {names}")
    else:
        console.print(f"[bold green]✓ conforms[/] ({counts})")


def register(app: typer.Typer) -> None:
    """Add this command."""
    options = FieldOptions(
        EngineConfig, names=("device", *MODEL_OPTIONS), panels=ENGINE_PANELS, special=ENGINE_SPECIAL
    )
    command(app, "conformance", conformance, engine=options)
