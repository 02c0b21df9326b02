"""``reprise doctor conformance``: does this platform keep the contract?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from reprise.cli.command import command
from reprise.cli.doctor.group import AsJson, print_json, table
from reprise.errors import ConfigError

if TYPE_CHECKING:
    from reprise.doctor.conformance import Conformance

EXIT_FAILED = 1
STYLES = {"pass": "[green]pass[/]", "fail": "[bold white on red] FAIL [/]", "skip": "[dim]skip[/]"}


def conformance(
    device: Annotated[str, typer.Option(help="Platform to try, or auto.")] = "auto",
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
) -> None:
    """Try every contract that a platform must keep; exit with status 1 if one is broken."""
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
    command(app, "conformance", conformance)
