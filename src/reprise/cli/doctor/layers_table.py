"""A model against the references of its ops, as a table: one line a layer."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from reprise.cli.doctor.group import table

if TYPE_CHECKING:
    from reprise.doctor.conformance.layers import CallReport, ModelReport


def show(report: ModelReport) -> None:
    """Print it."""
    console = Console()
    facts = report.facts
    made = table(
        f"{facts['model']} on {facts['device']}: ops against their references",
        "step", "layer", "worst call", "differs by", "allowed", "so far",
    )  # fmt: skip
    made.columns[2].no_wrap = True
    for column in made.columns[3:]:
        column.justify = "right"
    step = ""
    for (name, layer), group in groupby(report.calls, lambda each: (each.step, each.layer)):
        if step and name != step:
            made.add_section()
        step = name
        calls = list(group)
        worst = max(calls, key=_badness)
        label = f"{worst.op}={worst.implementation}"
        made.add_row(
            name,
            "" if layer is None else str(layer),
            f"[bold red]{label}[/]" if worst.wrong else label,
            f"{worst.difference:.1e}",
            f"{worst.allowed:.0e}",
            f"{calls[-1].drift:.1e}",
        )
    console.print(made)
    compared = [each for each in report.calls if each.implementation != "reference"]
    same = f"the most likely token is the same in {report.agreeing} of {report.rows} rows"
    if not compared:
        console.print("[yellow]every op is its reference here: nothing to compare[/]")
        return
    if not report.wrong:
        console.print(
            f"[bold green]✓ all {len(compared)} calls agree with their references[/]; {same}"
        )
        return
    console.print(f"[bold red]✗ {len(report.wrong)} of {len(compared)} calls are wrong[/]; {same}")
    for each in report.wrong[:10]:
        console.print(escape(str(each)))
    if len(report.wrong) > 10:
        console.print("further ones are in the output of --json")


def _badness(call: CallReport) -> float:
    return call.difference / call.allowed if call.allowed else call.difference
