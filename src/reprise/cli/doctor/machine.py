"""``reprise doctor``: the device, the platforms, the versions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reprise.cli.command import runnable
from reprise.cli.doctor.group import AsJson, print_json, table


def machine(
    ctx: typer.Context,
    device: Annotated[str, typer.Option(help="Platform to describe, or auto.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Show the device, all platforms (or why one is not usable), versions and memory.

    'reprise doctor ops' lists the ops and their implementations.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options(ctx)
        return
    report = inspect_machine(device)
    if as_json:
        print_json(report)
    else:
        _show(report)


def _refuse_options(ctx: typer.Context) -> None:
    """Options before a subcommand are of this report, and would have no effect."""
    for each in ctx.command.params:
        source = ctx.get_parameter_source(each.name or "")
        if source is not None and source.name == "COMMANDLINE":
            command = f"{ctx.command_path} {ctx.invoked_subcommand}"
            ctx.fail(f"{each.opts[0]} has no effect before a subcommand: give it after '{command}'")


def inspect_machine(device: str) -> dict[str, Any]:
    """The facts, ready for JSON.

    Raises:
        PlatformError: The device is unknown or not on this machine.
    """
    from reprise import platforms
    from reprise.bench.record import versions
    from reprise.doctor.facts import device_facts

    return {
        "device": device_facts(platforms.resolve(device)),
        "platforms": platforms.available(),
        "versions": versions(),
    }


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    device = report["device"]
    facts = table("Device", "", "")
    facts.show_header = False
    gib = 1 << 30
    memory = f"{device['memory_free'] / gib:.1f} of {device['memory_total'] / gib:.1f} GiB free"
    for name, value in (
        ("device", f"{device['device']} ({device['name']})"),
        ("memory", memory),
        ("default dtype", device["default_dtype"]),
        ("Triton kernels", "yes" if device["triton"] else "no"),
        ("device graphs", "yes" if device["graphs"] else "no"),
        ("graph memory", f"{device['graph_memory']}: {device['graph_memory_reason']}"),
        ("distributed", device["distributed"]),
    ):
        facts.add_row(name, str(value))
    console.print(facts)
    known = table("Platforms", "name", "usable here")
    for name, reason in report["platforms"].items():
        known.add_row(name, "[green]yes[/]" if reason is None else f"no: {reason}")
    console.print(known)
    installed = table("Versions", "package", "version")
    for name, version in report["versions"].items():
        installed.add_row(name, version or "[dim]not installed[/]")
    console.print(installed)


def register(app: typer.Typer) -> None:
    """Make this what the group does without a subcommand."""
    app.callback(invoke_without_command=True)(runnable(machine))
