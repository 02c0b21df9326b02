"""``reprise doctor conformance``: does this platform keep its contract, and compute a model?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from reprise.cli.command import command
from reprise.cli.doctor.group import AsJson, print_json
from reprise.cli.ending import Ending
from reprise.cli.failures import EXIT_INTERRUPTED
from reprise.cli.fields import FieldOptions
from reprise.cli.options import ENGINE_PANELS, ENGINE_SPECIAL
from reprise.config import EngineConfig
from reprise.errors import ConfigError

if TYPE_CHECKING:
    from reprise.doctor.conformance import Conformance, Outcome

EXIT_FAILED = 1
MODEL_OPTIONS = (
    "model", "revision", "dtype", "load_format", "hf_overrides", "max_model_len", "ops", "seed",
)  # fmt: skip
STYLES = {"pass": "[green]pass[/]", "fail": "[bold white on red]FAIL[/]", "skip": "[dim]skip[/]"}


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
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="End after so many seconds with what was found until then.",
            metavar="SECONDS",
            min=0,
        ),
    ] = None,
    engine: dict[str, Any],
) -> None:
    """Try every contract that a platform must keep; exit with status 1 if one is broken.

    Each verdict is printed when it is there. Ctrl-C, SIGTERM and --time-limit end the run with a
    report on what was tried, and status 130, 143 and 124.

    With --model, run that model instead, and compare each call of each op in each layer with the
    op's reference on the same inputs.
    """
    if "model" in engine:
        if only or explain or time_limit is not None:
            raise ConfigError(
                "--only, --explain and --time-limit are about contracts; leave them out with "
                "--model"
            )
        _compare_model(as_json, engine)
        return
    beside = [each for each in engine if each != "device"]
    if beside:
        given = ", ".join(f"{each}={engine[each]}" for each in beside)
        raise ConfigError(f"{given}: only with --model; contracts are tried on the demo model")
    _try_contracts(engine.get("device", "auto"), only, as_json, explain, time_limit)


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


def _try_contracts(
    device: str, only: list[str] | None, as_json: bool, explain: bool, time_limit: float | None
) -> None:
    from reprise.bench.record import heading, versions
    from reprise.doctor import conformance as kit

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
    attempts = kit.attempts(device, facts, chosen)
    report = next(attempts)
    lines = _Lines(report, beside=as_json)

    def conclude() -> None:
        report.ended = ending.reason if report.not_tried else None
        if as_json:
            print_json(report.to_dict())
        else:
            _conclude(report)

    ending = Ending(conclude, time_limit)
    try:
        with ending:
            for each in chosen:
                lines.begin(each.name)
                next(attempts)
                lines.end(report.outcomes[-1])
    except KeyboardInterrupt:
        lines.break_off()
    conclude()
    if report.not_tried:
        raise typer.Exit(ending.status or EXIT_INTERRUPTED)
    if report.failed:
        raise typer.Exit(EXIT_FAILED)


class _Lines:
    """A line for each contract: its number and name before it is tried, then the verdict.

    Args:
        report: Its device is named first.
        beside: On standard error, as standard output has JSON.
    """

    def __init__(self, report: Conformance, *, beside: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=beside, highlight=False, soft_wrap=True)
        self._total = len(report.chosen)
        self._width = max(map(len, report.chosen))
        self._number = 0
        facts = report.facts
        self._print(f"[bold]Conformance of {facts['platform']} ({facts['device_name']})[/]\n")

    def begin(self, name: str) -> None:
        self._number += 1
        count = f"{self._number:>{len(str(self._total))}}/{self._total}"
        self._print(f"[dim]{count}[/]  {name:<{self._width}}  ")

    def end(self, outcome: Outcome) -> None:
        from rich.markup import escape

        detail = escape(outcome.detail)
        if outcome.verdict == "fail":
            detail = f"{escape(outcome.summary)} [red]{detail}[/]"
        elif outcome.verdict == "skip":
            detail = f"[dim]{detail}[/]"
        self._print(f"{STYLES[outcome.verdict]}  [dim]{outcome.seconds:6.2f} s[/]  {detail}\n")

    def break_off(self) -> None:
        """The contract that was begun has no verdict."""
        self._print("[yellow]broken off[/]\n")

    def _print(self, text: str) -> None:
        self._console.print(text, end="")
        self._console.file.flush()


def _conclude(report: Conformance) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    counts = ", ".join(f"{report.count(each)} {each}" for each in ("pass", "fail", "skip"))
    if report.not_tried:
        console.print(
            f"[yellow]ended by {report.ended}[/] after {len(report.outcomes)} of "
            f"{len(report.chosen)} contracts"
        )
    if report.failed:
        names = ", ".join(each.name for each in report.failed)
        console.print(f"[bold red]✗ does not conform[/] ({counts}): {names}")
    elif report.not_tried:
        console.print(f"[yellow]? not known whether it conforms[/] ({counts})")
    else:
        console.print(f"[bold green]✓ conforms[/] ({counts})")


def register(app: typer.Typer) -> None:
    """Add this command."""
    options = FieldOptions(
        EngineConfig, names=("device", *MODEL_OPTIONS), panels=ENGINE_PANELS, special=ENGINE_SPECIAL
    )
    command(app, "conformance", conformance, engine=options)
